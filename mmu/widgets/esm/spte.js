// The spte player: switches for a word's bits, its state, and buttons for what the guest and KVM do to it.
// States, sentences and next words come from mmu.spte and mmu.update.
function render({ model, el }) {
  const { tables, sentences, states, actions } = model.get("data");
  const key = (v) => [v.kind, v.word, v.said].join();
  const parse = (text) => { const [kind, word, said] = text.split(",").map(Number); return { kind, word, said }; };
  const choose = (kind) => state.set(key({ kind, word: tables[kind].start, said: -1 }));
  const act = (i) => {
    const { kind, word } = parse(state.value);
    state.set(key({ kind, word: tables[kind].next[i][word], said: tables[kind].said[i][word] }));
  };
  const toggle = (place) => { const { kind, word } = parse(state.value); state.set(key({ kind, word: word ^ (1 << place), said: -1 })); };
  const hex = ({ bits, fixed }, word) => "0x" + bits.reduce(
    (sum, { bit }, i) => word >> (bits.length - 1 - i) & 1 ? sum | 1n << BigInt(bit) : sum, BigInt(fixed)).toString(16);

  const tabs = tables.map(({ name }, i) => h("button", { type: "button", class: "mmu-choice", onclick: () => choose(i) }, name));
  const ribbons = tables.map(({ bits }) => {
    const buttons = bits.map(({ name, bit, meaning, software }, i) =>
      h("button", { type: "button", class: `mmu-bit${software ? " mmu-soft" : ""}`, title: meaning,
        onclick: () => toggle(bits.length - 1 - i) },
        h("span", { class: "mmu-bit-number" }, `bit ${bit}`), h("span", { class: "mmu-bit-name" }, name)));
    return { buttons, box: h("div", { class: "mmu-bits mmu-bits-spte", role: "group", "aria-label": "Bits of the spte" }, buttons) };
  });
  const word = h("code", { class: "mmu-spte-word" });
  const means = h("td", {});
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const draw = (value) => {
    const now = parse(value), table = tables[now.kind], { name, meaning } = states[table.state[now.word]];
    tabs.forEach((button, i) => button.setAttribute("aria-pressed", String(i === now.kind)));
    ribbons.forEach(({ box, buttons }, i) => {
      if (i !== now.kind && box.contains(document.activeElement)) tabs[now.kind].focus(); // its switches go out of sight
      box.hidden = i !== now.kind;
      if (i === now.kind) buttons.forEach((button, j) =>
        button.setAttribute("aria-pressed", String(Boolean(now.word >> (buttons.length - 1 - j) & 1))));
    });
    word.textContent = hex(table, now.word);
    means.textContent = meaning;
    spoken.textContent = `${now.said < 0 ? "" : sentences[now.said] + " Now "}${hex(table, now.word)}: ${name}; the CPU ${sentences[table.cpu[now.word]]}.`;
    grey(undo, !state.depth);
  };
  const state = history(key({ kind: 0, word: tables[0].start, said: -1 }), draw);

  el.classList.add("mmu-spte");
  el.append(
    h("div", { class: "mmu-tabs", role: "group", "aria-label": "Kind of page table" }, tabs),
    ribbons.map(({ box }) => box).reduce((all, box) => (all.append(box), all), h("div", {})),
    h("p", { class: "mmu-keys" }, "Square: the CPU reads the bit. Round: only KVM does."),
    spoken,
    h("table", { class: "mmu-table" }, h("tbody", {},
      h("tr", {}, h("th", { scope: "row" }, "word"), h("td", {}, word)),
      h("tr", {}, h("th", { scope: "row" }, "state"), means))),
    h("div", { class: "mmu-controls" }, actions.map((name, i) =>
      h("button", { type: "button", onclick: () => act(i) }, `${i} ${name}`))),
    h("div", { class: "mmu-controls" },
      undo, h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: 0–4 let that happen, ← → kind of table, Tab and Space switch a bit, U undo, R reset")));
  const turn = (by) => choose((parse(state.value).kind + by + tables.length) % tables.length);
  onKeys(el, {
    ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), u: () => state.undo(), r: () => state.reset(),
    ...Object.fromEntries(actions.map((_, i) => [String(i), () => act(i)])),
  });
  draw(state.value);
}
export default { render };
