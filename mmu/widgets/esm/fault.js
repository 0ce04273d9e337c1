// The fault player: recorded events and what lies between them, one at a time. Every word comes from mmu.handling.
function render({ model, el }) {
  const { faults } = model.get("data");
  const parse = (text) => text.split(",").map(Number);
  const step = (by) => {
    const [fault, at] = parse(state.value);
    state.set([fault, Math.min(Math.max(at + by, 0), faults[fault].steps.length - 1)].join());
  };
  const choose = (fault) => state.set([fault, 0].join());

  const tabs = faults.map(({ name, steps }, i) =>
    h("button", { type: "button", onclick: () => choose(i) }, `${name}, ${steps.length} steps`));
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const flags = h("b", {}), quoted = h("span", {});
  const line = h("p", { class: "mmu-quoted" }, h("code", {}, flags, quoted)), none = h("span", { class: "mmu-none" });
  line.append(none);
  const lists = faults.map(({ name, steps }, i) => h("ol", { class: "mmu-story", "aria-label": `Steps, ${name}` },
    steps.map(({ label, locked, quoted }, at) => h("li", { "data-locked": String(locked), "data-recorded": String(Boolean(quoted)) },
      h("button", { type: "button", tabindex: "-1", onclick: () => state.set([i, at].join()) },
        h("span", { class: "mmu-dot", "aria-hidden": "true" }, quoted ? "●" : "○"), label)))));
  const back = h("button", { type: "button", onclick: () => step(-1), "aria-label": "Previous step" }, "◀");
  const next = h("button", { type: "button", onclick: () => step(1), "aria-label": "Next step" }, "▶");
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const draw = (value) => {
    const [fault, at] = parse(value), { steps } = faults[fault], now = steps[at];
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === fault)));
    lists.forEach((list, i) => {
      list.hidden = i !== fault;
      [...list.children].forEach((item, j) => {
        if (i === fault && j === at) item.firstChild.setAttribute("aria-current", "step");
        else item.firstChild.removeAttribute("aria-current");
      });
    });
    spoken.textContent = `Step ${at + 1} of ${steps.length}, ${now.lock}. ${now.spoken}`;
    flags.textContent = now.flags;
    quoted.textContent = now.quoted;
    line.firstChild.hidden = !now.quoted;
    none.textContent = now.quoted ? "" : "No event: nothing is recorded here.";
    line.dataset.locked = String(now.locked);
    grey(back, at === 0);
    grey(next, at === steps.length - 1);
    grey(undo, !state.depth);
  };
  const state = history("0,0", draw);

  el.classList.add("mmu-fault");
  el.append(
    h("div", { class: "mmu-which", role: "group", "aria-label": "Fault" }, tabs),
    h("div", { class: "mmu-beside" }, h("div", {}, lists), h("div", {}, spoken, line)),
    h("p", { class: "mmu-legend" }, h("span", {}, "● recorded"), h("span", {}, "○ done without an event"),
      h("span", {}, h("span", { class: "mmu-swatch" }), " under the mmu-lock")),
    h("div", { class: "mmu-controls" }, back, next, undo,
      h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: ← → step, " +
        faults.map(({ key, name }) => `${key.toUpperCase()} ${name}`).join(", ") + ", U undo, R reset")));
  onKeys(el, {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), u: () => state.undo(), r: () => state.reset(),
    ...Object.fromEntries(faults.map(({ key }, i) => [key, () => choose(i)])),
  });
  draw(state.value);
}
export default { render };
