// The level: which one counts, what made it so, and the operator's switch.

import {operatorCall} from "./calls.js";
import {$, el, facts, say, sayOrHide} from "./dom.js";
import {span} from "./format.js";

const NAME = "tidegate.name";
let levels = [];

export function showLevel(level) {
  if (!levels.length) fillChoices(level);
  levels = level.levels;
  const list = $("ladder");
  const key = `${level.level}`;
  if (list.dataset.shown !== key) {
    list.dataset.shown = key;
    list.replaceChildren(...levels.map((one) => el("li", {
      class: one.level === level.level ? `now l${one.level}` : null,
      "aria-current": one.level === level.level ? "step" : null,
      title: one.description,
    }, el("span", {class: "step"}, String(one.level)), named(one.name))));
  }
  say($("because"), `${level.level ? `${level.description}. ` : ""}${level.pin ? "" : "Automatic: "}${because(level)}.`);
  $("pin").hidden = !level.pin;
  $("level-clear").hidden = !level.pin;
  if (level.pin) {
    facts($("pin"), [["Held by", level.pin.by], ["Reason", level.pin.reason], ["For another", span(level.pin.ttl_s)],
      ["Without it", `level ${level.automatic_level}, pressure ${level.pressure}`]]);
  }
}

function because(level) {
  const pressure = `the pressure is ${level.pressure}, and above 1 the level rises`;
  if (level.pin) return "Held by an operator, whatever the pressure";
  return level.because === "pressure" ? pressure : `${level.because}; ${pressure}`;
}

function fillChoices(level) {
  $("level-choice").replaceChildren(...level.levels.map((one) =>
    el("option", {value: String(one.level), disabled: one.level === 4 && !level.has_fallback},
      `${one.level} · ${named(one.name)}`)));
  $("level-choice").value = "1";
}

export const named = (name) => name.replaceAll("_", " ");

// `refresh` reads the figures again after a change.
export function levelSwitch(refresh) {
  $("level-by").value = sessionStorage.getItem(NAME) ?? "";
  $("level-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const choice = Number($("level-choice").value);
    const ttl = $("level-ttl");
    const reason = $("level-reason").value.trim();
    const description = levels.find((one) => one.level === choice).description;
    const agreed = await confirmed(`Hold level ${choice}?`, `Every replica goes to ${description}, for ` +
      `${ttl.selectedOptions[0].textContent}, whatever the pressure. Reason: ${reason}`, `Hold level ${choice}`);
    if (!agreed) return;
    sessionStorage.setItem(NAME, $("level-by").value);
    const form = {level: choice, reason, ttl_s: Number(ttl.value), by: $("level-by").value.trim() || "console"};
    if (await attempt(() => operatorCall("PUT", "level", form))) $("level-reason").value = "";
    refresh();
  });
  $("level-clear").addEventListener("click", async () => {
    const agreed = await confirmed("Back to automatic?", "The pressure decides again, on every replica.", "Back to automatic");
    if (!agreed) return;
    const by = encodeURIComponent($("level-by").value.trim() || "console");
    await attempt(() => operatorCall("DELETE", `level?by=${by}`));
    refresh();
  });
}

async function attempt(change) {
  sayOrHide($("level-error"), "");
  try {
    await change();
    return true;
  } catch (error) {
    sayOrHide($("level-error"), error.message);
    return false;
  }
}

function confirmed(title, text, yes) {
  const dialog = $("confirm");
  say($("confirm-title"), title);
  say($("confirm-text"), text);
  say($("confirm-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), {once: true});
  });
}
