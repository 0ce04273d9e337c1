// The walk player: four entries, their rights ANDed downward, and the access that they let through or stop.
// Every sentence and every "left" comes from mmu.paging.
function render({ model, el }) {
  const { levels, rights, words, left, accesses, said, pointed, cases } = model.get("data");
  const key = (v) => [v.number, v.access, v.bits, v.level].join();
  const parse = (text) => { const [number, access, bits, level] = text.split(",").map(Number); return { number, access, bits, level }; };
  const ofCase = (number) => key({ number, access: cases[number].access, bits: cases[number].state, level: 0 });
  const change = (part) => state.set(key({ ...parse(state.value), ...part }));
  const step = (by) => state.set(ofCase((parse(state.value).number + by + cases.length) % cases.length));
  const toggle = (level, right) => change({ bits: parse(state.value).bits ^ (1 << (3 * (level - 1) + right)), level: 0 });
  const point = (level) => change({ level });

  const said1 = h("p", { class: "mmu-asked" }), spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const makes = accesses.map((name, i) =>
    h("button", { type: "button", class: "mmu-choice", onclick: () => change({ access: i, level: 0 }) }, name));
  const rows = levels.map((level) => {
    const word = h("code", {});
    const bits = rights.map((right, i) =>
      h("button", { type: "button", class: "mmu-bit", "aria-label": `${right} of level ${level}`, onclick: () => toggle(level, i) }, right));
    const below = rights.map((right) => h("span", { class: "mmu-left" }, right));
    const ask = h("button", { type: "button", class: "mmu-point", "aria-label": `Level ${level} denies`, onclick: () => point(level) }, String(level));
    return { word, bits, below, ask, tr: h("tr", {}, h("th", { scope: "row" }, ask), h("td", {}, word),
      h("td", { class: "mmu-rights" }, bits), h("td", { class: "mmu-rights" }, below)) };
  });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const draw = (value) => {
    const { number, access, bits, level } = parse(value);
    said1.textContent = `Case ${number + 1} of ${cases.length}. ${cases[number].text}`;
    makes.forEach((button, i) => button.setAttribute("aria-pressed", String(i === access)));
    const rest = left.map((column) => Number(column[bits]));
    rows.forEach((row, i) => {
      const own = bits >> (3 * (levels[i] - 1)) & 7;
      row.word.textContent = words[i][own];
      row.bits.forEach((button, j) => button.setAttribute("aria-pressed", String(Boolean(own >> j & 1))));
      row.below.forEach((cell, j) => { cell.dataset.on = String(Boolean(rest[i] >> j & 1)); });
      row.ask.setAttribute("aria-pressed", String(levels[i] === level));
    });
    const kept = rights.filter((_, j) => rest[rest.length - 1] >> j & 1).join(" ") || "nothing";
    const answer = level ? " " + pointed[access][levels.indexOf(level)][bits >> (3 * (level - 1)) & 7] : "";
    spoken.textContent = `At the page: ${kept}; ${said[access][rest[rest.length - 1]]}.${answer}`;
    grey(undo, !state.depth);
  };
  const state = history(ofCase(0), draw);

  el.classList.add("mmu-walk");
  el.append(
    said1,
    h("div", { class: "mmu-tabs", role: "group", "aria-label": "Access" }, makes),
    h("table", { class: "mmu-walk-table" },
      h("thead", {}, h("tr", {}, ["level", "entry", "its own rights", "left so far"].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", {}, rows.map((row) => row.tr))),
    spoken,
    h("div", { class: "mmu-controls" },
      h("button", { type: "button", onclick: () => step(-1), "aria-label": "Previous case" }, "◀"),
      h("button", { type: "button", onclick: () => step(1), "aria-label": "Next case" }, "▶"),
      undo, h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: ← → case, 1–4 this level denies, Tab and Space switch a right, A another access, U undo, R reset")));
  onKeys(el, {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), u: () => state.undo(), r: () => state.reset(),
    a: () => change({ access: (parse(state.value).access + 1) % accesses.length, level: 0 }),
    ...Object.fromEntries(levels.map((level) => [String(level), () => point(level)])),
  });
  draw(state.value);
}
export default { render };
