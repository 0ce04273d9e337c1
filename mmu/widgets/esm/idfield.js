// The id field inside an spte: move it, widen it, read what it runs into. Verdicts come from mmu.spte.
function render({ model, el }) {
  const { cells, states, maybe, mmio, start } = model.get("data");
  const key = (low, width) => width * 64 + low;
  const place = (value) => [value % 64, Math.floor(value / 64)];
  const move = (by, wider) => {
    const [low, width] = place(state.value);
    const now = Math.max(1, Math.min(states.length, width + wider));
    state.set(key(Math.max(0, Math.min(64 - now, low + by)), now));
  };
  const bits = cells.map((name, bit) => h("span", { class: "mmu-cell", title: `bit ${bit} ${name}`, "data-mmio": mmio.includes(bit) && "yes" },
    h("i", {}, bit % 8 && bit !== 63 ? "" : bit), h("b", {})));
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");
  const draw = (value) => {
    const [low, width] = place(value);
    const [sign, said] = states[width - 1][low];
    bits.forEach((cell, bit) => {
      const own = bit >= low && bit < low + width;
      cell.dataset.own = own ? "yes" : "no";
      cell.dataset.used = maybe.includes(bit) ? "maybe" : cells[bit] ? "yes" : "no";
      cell.lastChild.textContent = own ? { yes: "×", maybe: "!", no: "i" }[cell.dataset.used] : cells[bit] || "·";
    });
    spoken.textContent = `${sign} ${said}`;
    grey(undo, !state.depth);
  };
  const state = history(key(...start), draw);
  const button = (text, by, wider, label) => h("button", { type: "button", "aria-label": label, onclick: () => move(by, wider) }, text);
  el.classList.add("mmu-idfield");
  el.append(
    h("div", { class: "mmu-ribbon", "aria-hidden": "true" }, [...bits].reverse()),
    h("p", { class: "mmu-keys" }, "i: the id; × where it runs into a field in use. R W X rights, M memory type, I ignore PAT, S page size, H host-writable, P page frame number, a address if the CPU has that many bits. Double line: bits of the MMIO mask."),
    spoken,
    h("div", { class: "mmu-controls" }, button("◀", 1, 0, "Move up by a bit"), button("▶", -1, 0, "Move down by a bit"),
      button("wider", 0, 1, "Wider"), button("narrower", 0, -1, "Narrower"), undo,
      h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: ← → move, + or ↑ wider, - or ↓ narrower, U undo, R reset")));
  onKeys(el, {
    ArrowLeft: () => move(1, 0), ArrowRight: () => move(-1, 0), ArrowUp: () => move(0, 1), ArrowDown: () => move(0, -1),
    "+": () => move(0, 1), "-": () => move(0, -1), u: () => state.undo(), r: () => state.reset(),
  });
  draw(state.value);
}
export default { render };
