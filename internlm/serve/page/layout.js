// The groups of the ranks, the stages of the model and the timeline of a step, as `internlm layout` prints them.

import { getJson } from "./api.js";
import { make, makeTable } from "./dom.js";
import { makeTimeline } from "./timeline.js";

export function openLayout(section) {
  const body = section.querySelector(".layout-body");
  const button = section.querySelector(".show-layout");

  button.addEventListener("click", async () => {
    body.replaceChildren(make("p", { class: "hint", role: "status" }, "computing …"));
    try {
      const layout = await ask(0);
      button.hidden = true;
      body.replaceChildren(...describe(layout));
    } catch (error) {
      body.replaceChildren(make("p", { class: "notice", role: "alert" }, error.message));
    }
  });
}

const ask = (rank) => getJson(`/run/layout?rank=${encodeURIComponent(rank)}`);

function describe(layout) {
  const tables = make("div", { class: "tables" }, ...describeTables(layout));
  const rank = make("input", { type: "number", min: 0, max: layout.world_size - 1, value: layout.rank });
  rank.addEventListener("change", async () => {
    try {
      tables.replaceChildren(...describeTables(await ask(rank.value)));
    } catch (error) {
      tables.replaceChildren(make("p", { class: "notice", role: "alert" }, error.message));
    }
  });
  const field = make("label", { hidden: layout.world_size === 1 }, "Groups of rank ", rank);
  return [make("h3", {}, layout.title), makeTimeline(layout.timeline), field, tables];
}

/** Views without an axis, as of a run on one rank, are left out. */
function describeTables({ tables }) {
  return tables.filter(({ rows, notes }) => rows.length || notes.join("").trim()).map(describeTable);
}

function describeTable({ title, rows, alignment, notes }) {
  const part = make("div", {}, make("h3", {}, title));
  if (rows.length) part.append(make("div", { class: "scroll" }, makeTable(rows, (column) => alignment[column] === ">")));
  const paragraphs = notes.join("\n").split("\n\n").filter((text) => text.trim());
  if (paragraphs.length) part.append(make("div", { class: "notes" }, ...paragraphs.map((text) => make("p", {}, text))));
  return part;
}
