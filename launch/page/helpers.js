const $ = id => document.getElementById(id);
const root = document.documentElement;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const STORE = "page:" + location.pathname;
const memory = {  // storage may be forbidden for local files
  get(key) { try { return JSON.parse(sessionStorage.getItem(STORE + key)); } catch { return null; } },
  set(key, value) { try { sessionStorage.setItem(STORE + key, JSON.stringify(value)); } catch { /* the page forgets */ } },
};

// --- small helpers ----------------------------------------------------------------------------------------------------
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "rect", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function fmt(value, unit = "number") {  // as fmt() in launch/page/numbers.py
  if (value === null || value === undefined) return "–";
  const digits = (v, n) => String(Number(v.toPrecision(n)));
  if (unit === "percent") return value !== 0 && Math.abs(value) < 1e-6 ? "<0.0001%" : digits(100 * value, 3) + "%";
  if (unit === "seconds") return value >= 1 || value === 0 ? digits(value, 3) + " s" : digits(1000 * value, 3) + " ms";
  if (unit === "gib") return value.toFixed(2) + " GiB";
  const scales = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  for (const [scale, letter] of scales)
    if (Math.abs(value) >= scale && (scale > 1e3 || Math.abs(value) >= 1e4)) return digits(value / scale, 3) + letter;
  return unit === "count" || Math.abs(value) >= 1000 ? value.toFixed(0) : digits(value, 4);
}

function ticks(low, high, number, whole = false) {
  const rough = (high - low) / number, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= rough * 0.999 && (!whole || Number.isInteger(s))) ?? 1;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const probe = document.body.appendChild(make("span", { hidden: "" }));
function rgb(name) {  // of a colour variable, in the theme that is on
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
}
const css = c => `rgb(${c.map(Math.round)})`;
const blend = (a, b, t) => a.map((v, i) => v + (b[i] - v) * t);

function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  $("theme").textContent = "Theme: " + theme;
  memory.set("theme", theme);
}
