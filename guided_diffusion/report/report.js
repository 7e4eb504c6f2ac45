"use strict";
const $ = id => document.getElementById(id);
const {cases, strips, sort: order, range} = JSON.parse($("data").textContent);
const body = $("list").tBodies[0];
const rows = [...body.rows].sort((a, b) => a.dataset.index - b.dataset.index);
const heads = [...$("list").tHead.rows[0].cells].filter(head => head.dataset.key);
let shown = rows, current = null;

const make = (kind, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
};
const cell = (row, key) => row.querySelector(`[data-key="${key}"]`);
const value = (row, key) => cell(row, key)?.dataset.value ?? "";
const address = file => file.split("/").map(encodeURIComponent).join("/");
const title = one => one.name + (one.class ? ` · ${one.class}` : "");

// ---------------------------------------------------------------- pictures

const pressed = layer => document.querySelector(`[data-layer="${layer}"]`)?.getAttribute("aria-pressed") === "true";

// The panel of an overlay that shows the chosen layers: image, truth where there is one, fused, uncertainty.
function panel(view, small) {
  if (!small && pressed("uncertainty")) return view.panels - 1;
  if (small || pressed("fused")) return view.panels - 2;
  return view.panels === 4 && pressed("truth") ? 1 : 0;
}

function scene(one, view, small = false) {
  const svg = $("scene").content.firstElementChild.cloneNode(true);
  const [width, height] = view.width ? [view.width, view.height] : [4, 3];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const label = view.label ? `${title(one)}, ${view.label}` : title(one);
  const what = !view.width ? "no picture in this report" : [
    "image", ...(view.truth || view.panels === 4 ? ["truth"] : []), "fused mask and uncertainty"].join(", ");
  svg.querySelector("title").textContent = `${label}: ${what}`;
  const place = (kind, link, box) => {
    const image = svg.querySelector("." + kind);
    if (!link) return image.remove();
    image.setAttribute("href", link);
    ["x", "y", "width", "height"].forEach((name, k) => image.setAttribute(name, box[k]));
  };
  if (view.overlay) {
    const [left, top, step] = view.grid;
    svg.classList.add("crop");
    place("photo", address(view.overlay), [-left - step * panel(view, small), -top, ...view.size]);
  } else place("photo", view.image, [0, 0, width, height]);
  place("uncertainty", view.uncertainty, [0, 0, width, height]);
  svg.querySelector(".truth").setAttribute("d", view.truth ?? "");
  svg.querySelector(".fused").setAttribute("d", view.fused ?? "");
  return svg;
}

const scenes = (one, small) => one.views.map(view => {
  const figure = make("figure", {}, scene(one, view, small));
  if (view.label && !small) figure.append(make("figcaption", {textContent: view.label}));
  return figure;
});

// Thumbnails are made when their row comes near the visible part of the page.
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    const row = entry.target, one = cases[row.dataset.index];
    row.querySelector(".thumb").replaceChildren(scene(one, one.views.at(-1), true));
    seen.unobserve(row);
  }
}, {rootMargin: "200px"});

// ---------------------------------------------------------------- the case shown

function show(row, {scroll = false, focus = false} = {}) {
  for (const other of [current, row]) if (other) {
    other.setAttribute("aria-selected", other === row);
    other.tabIndex = other === row ? 0 : -1;
  }
  current = row ?? null;
  $("viewer").classList.toggle("none", !row);
  if (!row) {
    $("stage").replaceChildren(make("p", {className: "empty", textContent: "No case fits the filter."}));
    for (const id of ["name", "place", "values", "links"]) $(id).replaceChildren();
    return;
  }
  const one = cases[row.dataset.index];
  $("stage").replaceChildren(...scenes(one));
  $("name").textContent = title(one);
  $("place").textContent = `${shown.indexOf(row) + 1} of ${shown.length}`;
  $("values").replaceChildren(...heads.filter(head => !("text" in head.dataset)).map(head =>
    make("div", {}, make("dt", {textContent: head.textContent}), make("dd", {textContent: cell(row, head.dataset.key).textContent}))));
  $("links").replaceChildren(...Object.entries(one.links).map(([label, file]) =>
    make("a", {textContent: label, target: "_blank", href: address(file)})));
  if (focus) row.focus({preventScroll: true});
  if (!scroll) return;
  const box = $("list-box"), top = row.offsetTop - $("list").tHead.offsetHeight, bottom = row.offsetTop + row.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

function filter() {
  const text = $("search").value.trim().toLowerCase();
  const low = $("low").value === "" ? -Infinity : Number($("low").value);
  const high = $("high").value === "" ? Infinity : Number($("high").value);
  const of = $("class")?.value ?? "";
  shown = [...body.rows].filter(row => {
    const number = value(row, range);
    const within = number === "" ? low === -Infinity && high === Infinity : low <= +number && +number <= high;
    row.hidden = !(within && value(row, "name").toLowerCase().includes(text) && (!of || value(row, "class") === of));
    return !row.hidden;
  });
  $("count").textContent = shown.length === rows.length ? `${rows.length} rows` : `${shown.length} of ${rows.length} rows`;
  show(shown.includes(current) ? current : shown[0]);
}

function sort(head, ascending) {
  const key = head.dataset.key, text = "text" in head.dataset, size = "size" in head.dataset;
  for (const other of heads) other.setAttribute("aria-sort", other !== head ? "none" : ascending ? "ascending" : "descending");
  const sign = ascending ? 1 : -1, names = new Intl.Collator(undefined, {numeric: true});
  const keyed = [...body.rows].map(row => {
    const own = value(row, key);
    return [text || own === "" ? own : size ? Math.abs(own) : +own, row];
  });
  keyed.sort(([a], [b]) => a === "" || b === "" ? (a === "") - (b === "") : sign * (text ? names.compare(a, b) : a - b));
  if (keyed.some(([, row], k) => row !== body.rows[k])) body.replaceChildren(...keyed.map(([, row]) => row));
  filter();
}

function go(row) {
  if (row.hidden) {
    for (const id of ["search", "low", "high", "class"]) if ($(id)) $(id).value = "";
    filter();
  }
  show(row, {scroll: true});
  $("viewer").scrollIntoView({block: "nearest"});
}

function toggle(layer) {
  const button = document.querySelector(`[data-layer="${layer}"]`);
  if (!button) return;
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  document.body.classList.toggle(`no-${layer}`, !on);
  if (current) $("stage").replaceChildren(...scenes(cases[current.dataset.index]));
}

function step(event, all = false) {
  const place = shown.indexOf(current), page = Math.max(1, Math.floor($("list-box").clientHeight / (current?.offsetHeight || 30)) - 2);
  const to = {
    ArrowDown: place + 1, ArrowUp: place - 1, ...(all ? {} : {ArrowRight: place + 1, ArrowLeft: place - 1}),
    ...(all ? {Home: 0, End: shown.length - 1, PageDown: place + page, PageUp: place - page} : {}),
  }[event.key];
  if (to === undefined || !shown.length) return false;
  event.preventDefault();
  show(shown[Math.min(shown.length - 1, Math.max(0, to))], {scroll: true, focus: all});
  return true;
}

// ---------------------------------------------------------------- start

$("strip").replaceChildren(...strips.map(([heading, ones]) => make("div", {},
  make("h3", {textContent: heading}),
  make("div", {}, ...ones.map(([index, note]) => {
    const one = cases[index];
    const card = make("button", {className: "card", type: "button"},
      make("span", {className: "both"}, ...one.views.map(view => scene(one, view, true))),
      make("span", {className: "line"}, make("i", {textContent: title(one), title: title(one)}), make("b", {textContent: note})));
    card.setAttribute("aria-label", `${heading}: ${title(one)}, ${note}`);
    card.addEventListener("click", () => go(rows[index]));
    return card;
  })))));
for (const head of heads)
  head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    sort(head, now === "none" ? !("down" in head.dataset) : now === "descending");
  });
for (const button of document.querySelectorAll("[data-layer]"))
  button.addEventListener("click", () => toggle(button.dataset.layer));
for (const id of ["search", "low", "high", "class"]) $(id)?.addEventListener("input", filter);
const opacity = () => document.documentElement.style.setProperty("--opacity", $("opacity").value);
$("opacity").addEventListener("input", opacity);
opacity();
body.addEventListener("click", event => show(event.target.closest("tr"), {focus: true}));
body.addEventListener("focusin", event => {
  const row = event.target.closest("tr");
  if (row !== current) show(row);
});
body.addEventListener("keydown", event => {
  if (step(event, true)) event.stopPropagation();
  else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    $("viewer").scrollIntoView({block: "nearest"});
  }
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const layer = {i: "photo", t: "truth", f: "fused", u: "uncertainty"}[event.key];
  if (layer) toggle(layer);
  else if (/^Arrow(Left|Right)$/.test(event.key)) step(event);
});
for (const dot of document.querySelectorAll(".dot[data-index]"))
  dot.addEventListener("click", () => go(rows[dot.dataset.index]));
sort(heads.find(head => head.dataset.key === order.key), order.ascending);
for (const row of rows) seen.observe(row);
