// Elements are made here, from text only: what a model writes never becomes markup.

/** An element with attributes and children, which are elements or texts. `class` and `on...` are attributes as well. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** A table; the first row is its header. `isRight(column)` says which columns hold numbers. */
export function makeTable(rows, isRight = () => false) {
  const cells = (row, kind) =>
    row.map((text, column) => make(kind, { class: isRight(column) ? "right" : null, scope: kind === "th" && "col" }, text));
  const [head, ...body] = rows;
  return make(
    "table",
    { class: "data" },
    make("thead", {}, make("tr", {}, ...cells(head, "th"))),
    make("tbody", {}, ...body.map((row) => make("tr", {}, ...cells(row, "td")))),
  );
}

/** A preference of this browser; without storage it lasts as long as the page. */
export const preferences = {
  get(name, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`internlm-${name}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`internlm-${name}`, JSON.stringify(value));
    } catch {
      // Private windows of some browsers have no storage.
    }
  },
};

/** A color of the style sheet, as the canvas understands it. */
export function color(name) {
  const probe = make("span", { hidden: true });
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** A number in few characters. */
export function short(value) {
  if (typeof value !== "number") return String(value ?? "–");
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return Number.isInteger(value) ? value.toLocaleString("en") : Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(5)));
}
