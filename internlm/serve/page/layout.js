// The groups of the ranks, the stages of the model and the timeline of a step, as `internlm layout` prints them.

import { getJson } from "./api.js";
import { make, makeTable } from "./dom.js";
import { makeTimeline } from "./timeline.js";

export function openLayout(section) {
  const body = section.querySelector(".layout-body");
  const button = section.querySelector(".show-layout");

  const show = async (rank) => {
    body.replaceChildren(make("p", { class: "hint", role: "status" }, "computing …"));
    try {
      const layout = await getJson(`/run/layout?rank=${encodeURIComponent(rank)}`);
      button.hidden = true;
      body.replaceChildren(...describe(layout, show));
    } catch (error) {
      body.replaceChildren(make("p", { class: "notice", role: "alert" }, error.message));
    }
  };
  button.addEventListener("click", () => show(0));
}

function describe(layout, show) {
  const rank = make("input", { type: "number", min: 0, max: layout.world_size - 1, value: layout.rank });
  rank.addEventListener("change", () => show(rank.value));
  return [
    make("h3", {}, layout.title),
    makeTimeline(layout.timeline),
    make("label", { hidden: layout.world_size === 1 }, "Groups of rank ", rank),
    ...layout.tables.map(describeTable),
  ];
}

function describeTable({ title, rows, alignment, notes }) {
  const part = make("div", {}, make("h3", {}, title));
  if (rows.length) part.append(make("div", { class: "scroll" }, makeTable(rows, (column) => alignment[column] === ">")));
  const paragraphs = notes.join("\n").split("\n\n").filter((text) => text.trim());
  if (paragraphs.length) part.append(make("div", { class: "notes" }, ...paragraphs.map((text) => make("p", {}, text))));
  return part;
}
