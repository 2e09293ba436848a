// Continue a prompt.

import { complete } from "./api.js";
import { connectForm, showParts } from "./generation.js";
import { NUM_ALTERNATIVES, addModels, addSettings, readSettings } from "./settings.js";
import { TokenText, fillLegend } from "./tokens.js";

export function open(panel, { models }) {
  const find = (selector) => panel.querySelector(selector);
  const settings = find(".settings");
  addSettings(settings);
  const model = addModels(settings, models);
  fillLegend(find(".legend"));
  let shown = null;

  connectForm(find("form"), (signal) => {
    shown?.close();
    shown = new TokenText(find(".answer"), "Text");
    const asked = readSettings(settings);
    const body = { ...asked, model: model.value, prompt: find("textarea").value, logprobs: NUM_ALTERNATIVES };
    return showParts(complete({ ...body, echo: find("[name=echo]").checked }, signal), shown, find(".status"), asked.seed);
  });
}
