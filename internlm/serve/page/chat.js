// A conversation by the template of the tokenizer.

import { chat } from "./api.js";
import { make } from "./dom.js";
import { connectForm, showParts } from "./generation.js";
import { NUM_ALTERNATIVES, addModels, addSettings, readSettings } from "./settings.js";
import { TokenText, fillLegend } from "./tokens.js";

export function open(panel, { models }) {
  const find = (selector) => panel.querySelector(selector);
  const [form, settings, input, list] = [find("form"), find(".settings"), find("#chat-input"), find(".messages")];
  addSettings(settings);
  const model = addModels(settings, models);
  fillLegend(find(".legend"));
  let messages = [];

  const checkTemplate = () => {
    const chosen = models.find((each) => each.id === model.value);
    find(".reason").hidden = chosen.has_chat_template;
    find(".reason").textContent =
      `The tokenizer of ${chosen.id} has no chat template, as base models have none. ` +
      "Use Complete, or start the server with --chat-template FILE.";
    find(".send").disabled = !chosen.has_chat_template;
  };
  model.addEventListener("change", checkTemplate);
  checkTemplate();

  const addMessage = (role, text) => {
    const content = make("div", {}, text);
    list.append(make("li", { class: role }, make("span", { class: "role" }, role), content));
    content.scrollIntoView({ block: "nearest" });
    return content;
  };

  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit(find(".send"));
    }
  });
  find(".clear").addEventListener("click", () => {
    find(".stop").click();
    messages = [];
    list.replaceChildren();
    find(".status").textContent = "";
    input.focus();
  });

  connectForm(form, async (signal) => {
    const text = input.value;
    if (!text.trim()) return;
    const own = (messages = [...messages, { role: "user", content: text }]);
    input.value = "";
    addMessage("user", text);
    const shown = new TokenText(addMessage("assistant", ""), "Answer");
    const asked = readSettings(settings);
    const system = find("[name=system]").value;
    const sent = [...(system ? [{ role: "system", content: system }] : []), ...own];
    const body = { ...asked, model: model.value, messages: sent, logprobs: true, top_logprobs: NUM_ALTERNATIVES };
    const reason = await showParts(chat(body, signal), shown, find(".status"), asked.seed);
    if (messages !== own) return;
    if (reason !== "failed") {
      messages = [...own, { role: "assistant", content: shown.text }];
      return;
    }
    // The message can be changed and sent again.
    messages = own.slice(0, -1);
    list.lastElementChild.remove();
    list.lastElementChild.remove();
    input.value = text;
  });
}
