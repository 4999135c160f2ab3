// Small ways to make elements. Text is always text: nothing here, or anywhere in the console, parses markup.

export const $ = (id) => document.getElementById(id);

// A new element. `attributes` with a function are listeners; children are elements or text.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.map(asNode));
  return node;
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child ?? ""));
}

// Change an element's text only when it differs, so that screen readers and selections are left alone.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Show text, or hide the element if there is none.
export function sayOrHide(node, text) {
  say(node, text);
  node.hidden = !text;
}

// A table, drawn again only when its content has changed, and then only its rows: whoever reads or scrolls stays there.
// A cell is text, `{text, badge}` with the badge's class, or `{text, share}` with a bar.
export function table(holder, caption, columns, rows, empty) {
  const key = JSON.stringify(rows);
  if (holder.dataset.shown === key) return;
  holder.dataset.shown = key;
  if (!rows.length) {
    holder.replaceChildren(el("p", {class: "empty"}, empty));
    return;
  }
  const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, i) => drawCell(cell, columns[i], i === 0)))));
  const before = holder.querySelector("tbody");
  if (before) {
    before.replaceWith(body);
    return;
  }
  const head = el("tr", {}, ...columns.map((c) => el("th", {scope: "col", class: c.number ? "number" : null}, c.title)));
  const drawn = el("table", {}, el("caption", {class: "hidden-text"}, caption), el("thead", {}, head), body);
  holder.replaceChildren(el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption}, drawn));
}

function drawCell(cell, column, first) {
  const plain = typeof cell !== "object" || cell === null;
  const classes = [column.number ? "number" : "", column.wide ? "wide" : ""].join(" ").trim();
  const tag = first ? "th" : "td";
  const node = el(tag, {class: classes || null, scope: first ? "row" : null});
  if (plain) node.append(String(cell ?? ""));
  else if (cell.share !== undefined) node.append(bar(cell.share, cell.text), el("span", {class: "beside"}, cell.text));
  else node.append(cell.badge ? el("span", {class: `badge ${cell.badge}`}, cell.text) : String(cell.text));
  return node;
}

function bar(share, label) {
  return el("progress", {max: "1", value: String(Math.max(0, Math.min(1, share))), "aria-label": label});
}

// Name and value pairs for a `dl`, updated in place.
export function facts(list, pairs) {
  const key = JSON.stringify(pairs);
  if (list.dataset.shown === key) return;
  list.dataset.shown = key;
  list.replaceChildren(...pairs.map(([name, value, kind]) =>
    el("div", {}, el("dt", {}, name), el("dd", {class: kind || null}, value))));
}
