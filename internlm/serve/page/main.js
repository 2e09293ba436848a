// The frame of the page: tabs, key, theme. Each pane is a module.

import { getJson, setKey } from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as complete from "./complete.js";
import { preferences } from "./dom.js";
import * as run from "./run.js";

const PANES = { complete, chat, compare, run };
const tabs = [...document.querySelectorAll("[role=tab]")];
const nameOf = (tab) => tab.getAttribute("aria-controls");

function select(name, focus = false) {
  for (const tab of tabs) {
    const isChosen = nameOf(tab) === name;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    document.getElementById(nameOf(tab)).hidden = !isChosen;
    if (isChosen && focus) tab.focus();
  }
  history.replaceState(null, "", `#${name}`);
  document.dispatchEvent(new CustomEvent("pane-shown", { detail: name }));
}

function connectTabs() {
  for (const tab of tabs) tab.addEventListener("click", () => select(nameOf(tab)));
  document.getElementById("tabs").addEventListener("keydown", (event) => {
    const shown = tabs.filter((tab) => !tab.hidden);
    const here = shown.indexOf(document.activeElement);
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (here < 0 || next === undefined) return;
    event.preventDefault();
    select(nameOf(shown[(next + shown.length) % shown.length]), true);
  });
  addEventListener("hashchange", () => openPaneOfAddress());
}

function openPaneOfAddress() {
  const asked = location.hash.slice(1);
  const shown = tabs.filter((tab) => !tab.hidden).map(nameOf);
  select(shown.includes(asked) ? asked : shown[0]);
}

function connectTheme() {
  const button = document.getElementById("theme");
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
    document.dispatchEvent(new CustomEvent("theme-changed"));
  };
  const chosen = preferences.get("theme", null);
  if (chosen) document.documentElement.dataset.theme = chosen;
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    preferences.set("theme", theme);
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

function connectKey(retry) {
  const form = document.getElementById("key-form");
  document.addEventListener("key-needed", (event) => {
    form.hidden = false;
    form.querySelector("label").textContent = event.detail ? "This key is wrong; another one" : "This server wants a key";
    form.querySelector("input").focus();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(form.querySelector("input").value);
    form.hidden = true;
    retry();
  });
}

let isOpen = false;

async function open() {
  const failure = document.getElementById("connection");
  let state;
  try {
    state = await getJson("/overview");
  } catch (error) {
    failure.hidden = error.status === 401;
    failure.textContent = error.message;
    return;
  }
  failure.hidden = true;
  if (isOpen) return;
  isOpen = true;
  const name = state.models[0]?.id ?? state.run;
  document.title = `${name} – internlm`;
  for (const tab of tabs) {
    const needsModel = nameOf(tab) !== "run";
    tab.hidden = needsModel && !state.models.length;
    if (!tab.hidden) PANES[nameOf(tab)].open(document.getElementById(nameOf(tab)), state);
  }
  openPaneOfAddress();
}

connectTabs();
connectTheme();
connectKey(open);
await open();
