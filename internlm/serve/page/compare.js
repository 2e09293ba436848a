// One prompt, two checkpoints, one seed.

import { complete } from "./api.js";
import { make } from "./dom.js";
import { connectForm, showParts } from "./generation.js";
import { NUM_ALTERNATIVES, addModels, addSettings, readSettings } from "./settings.js";
import { TokenText, fillLegend } from "./tokens.js";

export function open(panel, { models }) {
  const find = (selector) => panel.querySelector(selector);
  const settings = find(".settings");
  if (models.length < 2) {
    find(".reason").hidden = false;
    find(".reason").textContent = "This server has one checkpoint. Start it with --beside DIR to compare it with another one.";
    find(".send").disabled = true;
  }
  addSettings(settings, { seed: 1024 });
  fillLegend(find(".legend"));

  const sides = ["left", "right"].map((name, index) => {
    const status = make("p", { class: "status", role: "status" });
    const answer = make("div", { class: "answer empty", "data-empty": "" });
    const select = addModels(make("fieldset"), models, name, index ? "Right" : "Left");
    select.value = models[Math.min(index, models.length - 1)].id;
    find(".sides").append(make("div", { class: "side" }, select.parentElement, answer, status));
    return { name, select, status, answer, shown: null };
  });

  connectForm(find("form"), async (signal) => {
    const asked = readSettings(settings);
    const body = { ...asked, prompt: find("#compare-prompt").value, logprobs: NUM_ALTERNATIVES };
    const status = find("form > .status");
    status.textContent = "";
    const reasons = await Promise.all(
      sides.map((side) => {
        side.shown?.close();
        side.shown = new TokenText(side.answer, `Text of ${side.select.value}`);
        return showParts(complete({ ...body, model: side.select.value }, signal), side.shown, side.status, asked.seed);
      }),
    );
    if (!reasons.includes("failed") && !reasons.includes("you")) status.textContent = difference(sides);
  });
}

/** Says where the texts differ, and marks the first tokens that do. */
function difference(sides) {
  const [left, right] = sides.map((side) => side.shown);
  if (left.text === right.text) return `The texts are equal at this seed: ${left.tokens.length} tokens.`;
  const length = Math.min(left.spans.length, right.spans.length);
  let index = 0;
  while (index < length && left.spans[index].textContent === right.spans[index].textContent) index += 1;
  for (const side of [left, right]) side.spans[index]?.classList.add("different");
  return index ? `The texts differ after ${index} equal tokens.` : "The texts differ from the first token on.";
}
