// Requests to the server, with the key of this browser tab.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const KEY = "internlm-key";

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...(options.headers ?? {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached; is it still running?", 0);
  }
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // An answer that is not of this server keeps its status as message.
  }
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: Boolean(key) }));
  throw new ApiError(message, response.status);
}

export async function getJson(path) {
  return (await send(path)).json();
}

/** The events of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html), as objects. */
async function* events(path, body, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await send(path, { ...options, headers: { "Content-Type": "application/json" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("the server ended the stream too early", 0);
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, event.error.code);
      yield event;
    }
  }
}

/**
 * The parts of a text: {text, tokens, finishReason}.
 * A token is {text, logprob, alternatives: [[text, logprob], ...]}; the first token of a prompt has no logprob.
 */
export async function* complete(body, signal) {
  for await (const event of events("/v1/completions", body, signal)) {
    for (const choice of event.choices) {
      const found = choice.logprobs;
      const tokens = (found?.tokens ?? []).map((text, index) => ({
        text,
        logprob: found.token_logprobs[index],
        alternatives: Object.entries(found.top_logprobs[index] ?? {}),
      }));
      yield { text: choice.text, tokens, finishReason: choice.finish_reason };
    }
  }
}

/** Like `complete`, for the answer to a conversation. */
export async function* chat(body, signal) {
  for await (const event of events("/v1/chat/completions", body, signal)) {
    for (const choice of event.choices) {
      const tokens = (choice.logprobs?.content ?? []).map((each) => ({
        text: each.token,
        logprob: each.logprob,
        alternatives: each.top_logprobs.map((top) => [top.token, top.logprob]),
      }));
      yield { text: choice.delta.content ?? "", tokens, finishReason: choice.finish_reason };
    }
  }
}
