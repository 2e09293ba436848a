// How tokens are chosen: fields that complete, chat and compare share.

import { make } from "./dom.js";

const FIELDS = [
  ["max_tokens", "New tokens", { min: 1, step: 1, value: 64 }],
  ["temperature", "Temperature", { min: 0, max: 2, step: "any", value: 1 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: "any", value: 1 }],
  ["top_k", "Top k (0: all)", { min: 0, step: 1, value: 0 }],
  ["seed", "Seed (empty: any)", { step: 1 }],
];

export const NUM_ALTERNATIVES = 5;

/** Adds the fields to a fieldset, with `values` in place of defaults. */
export function addSettings(fieldset, values = {}) {
  for (const [name, label, attributes] of FIELDS) {
    const input = make("input", { type: "number", name, ...attributes, value: values[name] ?? attributes.value });
    fieldset.append(make("label", { class: "field" }, label, input));
  }
}

export function addModels(fieldset, models, name = "model", label = "Model") {
  const options = models.map((model) => make("option", { value: model.id }, model.id));
  const select = make("select", { name }, ...options);
  const field = make("label", { class: "field" }, label, select);
  field.hidden = models.length < 2 && name === "model";
  fieldset.prepend(field);
  return select;
}

/** The settings as fields of a request; a seed that is left open is drawn, so that the answer can be repeated. */
export function readSettings(fieldset) {
  const asked = {};
  for (const [name] of FIELDS) {
    const input = fieldset.querySelector(`[name=${name}]`);
    if (input.value !== "") asked[name] = Number(input.value);
  }
  asked.seed ??= Math.floor(Math.random() * 2 ** 32);
  return asked;
}

const ENDS = { length: "limit of new tokens", stop: "end of the text", you: "stopped by you" };

/** What is said about a text that has ended. */
export function summary(tokens, seconds, reason, seed) {
  const scored = tokens.filter((token) => token.logprob != null);
  const mean = scored.reduce((sum, token) => sum + token.logprob, 0) / scored.length;
  const parts = [`${tokens.length} tokens`, `${(tokens.length / Math.max(seconds, 1e-3)).toFixed(1)} tokens/s`];
  if (scored.length) parts.push(`${(-mean).toFixed(3)} nats per token`);
  parts.push(`seed ${seed}`, `ended: ${ENDS[reason] ?? reason}`);
  return parts.join(", ");
}
