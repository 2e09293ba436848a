// A form that asks a model and shows its answer as it comes: sending, stopping, errors.

import { summary } from "./settings.js";
import { hideCard } from "./tokens.js";

/**
 * Connects a form with what it does.
 *
 * `start(signal)` is called for "send" and returns a promise; the form's buttons, Ctrl Enter and Esc start and stop it.
 */
export function connectForm(form, start) {
  const [send, stop] = [form.querySelector(".send"), form.querySelector(".stop")];
  let running = null;

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running || send.disabled) return;
    running = new AbortController();
    [send.disabled, stop.disabled] = [true, false];
    try {
      await start(running.signal);
    } finally {
      running = null;
      [send.disabled, stop.disabled] = [false, true];
    }
  });
  stop.addEventListener("click", () => running?.abort());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      hideCard();
      running?.abort();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit(send);
    }
  });
}

/** Shows the parts of a text; returns why it ended. Errors are shown in the status line. */
export async function showParts(parts, shown, status, seed) {
  const start = performance.now();
  let reason = "stop";
  status.classList.remove("error");
  status.textContent = "…";
  try {
    for await (const part of parts) {
      shown.push(part.text, part.tokens);
      reason = part.finishReason ?? reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      status.textContent = error.message;
      status.classList.add("error");
      return "failed";
    }
    reason = "you";
  } finally {
    shown.end();
  }
  status.textContent = summary(shown.tokens, (performance.now() - start) / 1000, reason, seed);
  return reason;
}
