// Place begin and end around a walk. Every choice was explored by mmu.board; this only picks and draws.
function render({ model, el }) {
  const { rows, memories, keys, states, kinds, says, start } = model.get("data");
  const SIGN = { barrier: "━", drain: "↓" }, SHAPE = ["●", "■"];
  const find = (choice) => keys.findIndex((key) => key.every((value, row) => value === choice[row]));
  let row = 0;

  // Begin and end push one another, so that begin never stands behind end, nor one without the other.
  const choose = (which, option) => {
    const choice = [...keys[state.value]];
    choice[which] = option;
    if (which < 2) {
      const other = 1 - which;
      if (!option) choice[other] = 0;
      else if (!choice[other]) choice[other] = which ? 1 : 3;
      if (choice[0] > choice[1]) choice[other] = option;
    }
    row = which;
    const next = find(choice);
    if (next === state.value) draw(next);
    else state.set(next);
  };
  const step = (by) => {
    const { options } = rows[row], now = keys[state.value][row];
    choose(row, Math.max(0, Math.min(options.length - 1, now + by)));
  };
  const pick = (by) => { row = (row + by + rows.length) % rows.length; draw(state.value); };

  const choices = rows.map(({ name, options }, which) => {
    const buttons = options.map((option, number) => h("button", { type: "button", onclick: () => choose(which, number) }, option));
    const line = h("div", { class: "mmu-place-row", role: "group", "aria-label": name }, h("span", { class: "mmu-place-name" }, name), h("span", { class: "mmu-options" }, buttons));
    return { line, buttons };
  });
  const sides = ["vCPU 0 walks", "vCPU 1 frees"].map((title, a) => {
    const code = h("ol", { class: "mmu-place-code" });
    return { code, box: h("div", { class: "mmu-actor", "data-actor": a, role: "group", "aria-label": title },
      h("span", {}, h("span", { class: "mmu-shape", "aria-hidden": "true" }, SHAPE[a]), ` ${title}`), code) };
  });
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const heading = h("p", { class: "mmu-place-heading" });
  const lanes = h("ol", { class: "mmu-lanes", tabindex: 0, "aria-label": "A shortest schedule that breaks it" });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const lane = (actor, kind, say, number) => h("li", { "data-kind": kind, "data-actor": actor },
    h("span", { class: "mmu-number" }, number),
    SHAPE.map((shape, a) => h("span", { class: "mmu-lane", "data-actor": a, "aria-hidden": "true" },
      a === actor ? h("span", { class: "mmu-mark" }, SIGN[kind] ?? shape) : "")),
    h("span", { class: "mmu-told" }, h("span", { class: "mmu-who" }, `vCPU ${actor} `), say));

  const draw = (value) => {
    const choice = keys[value], { walk, free, verdicts, memory, moves } = states[value];
    choices.forEach(({ line, buttons }, which) => {
      line.dataset.here = which === row ? "yes" : "no";
      buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(choice[which] === number)));
    });
    [walk, free].forEach((steps, a) => sides[a].code.replaceChildren(...steps.map((text) => {
      const own = /^(R2|R3|Z0|Z3)/.test(text);
      return h("li", { "data-placed": own ? "no" : "yes" }, h("code", {}, text));
    })));
    const told = verdicts.map(({ states, left }, m) => `${memories[m]}: ${left < 0 ? "safe" : `OOPS in ${left} moves`} (${states} states)`);
    const all = verdicts.every(({ left }) => left < 0), none = verdicts.every(({ left }) => left >= 0);
    spoken.textContent = `${all ? "✓ " : "✕ "}${told.join("; ")}.` + (all ? " No order is bad." : none ? "" : ` The order of steps is right; a store buffer breaks it.`);
    spoken.dataset.ended = all ? "safe" : "oops";
    heading.textContent = moves.length ? `A shortest way to OOPS under ${memory}:` : "";
    const list = [];
    for (let i = 0; i < moves.length; i += 3) list.push(lane(moves[i], kinds[moves[i + 1]], says[moves[i + 2]], i / 3 + 1));
    if (moves.length) list.push(h("li", { class: "mmu-oops" }, h("span", { "aria-hidden": "true" }, "✕ "), "OOPS: the walk uses a page that was freed."));
    lanes.replaceChildren(...list);
    lanes.hidden = !moves.length;
    grey(undo, !state.depth);
  };
  const state = history(start, draw);
  el.classList.add("mmu-place");
  el.append(
    h("div", {}, choices.map(({ line }) => line)),
    h("div", { class: "mmu-actors" }, sides.map(({ box }) => box)), spoken,
    h("div", { class: "mmu-controls" }, undo, h("button", { type: "button", onclick: () => { row = 0; state.reset(); } }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: ↑ ↓ pick a line, ← → change it, U undo, R reset")),
    heading, lanes);
  onKeys(el, { ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => pick(-1), ArrowDown: () => pick(1),
    u: () => state.undo(), r: () => { row = 0; state.reset(); } });
  el.tabIndex = 0;
  el.setAttribute("role", "group");
  el.setAttribute("aria-label", "Place begin and end");
  draw(start);
}
export default { render };
