// The PFEC player: five switches, one code, three verdicts. Every word it shows comes from mmu.pfec.
const SIGN = { fast: "→ fast", slow: "▦ slow", impossible: "× impossible" };

function render({ model, el }) {
  const { bits, codes, rules, start } = model.get("data");
  const hex = (code) => "0x" + code.toString(16).padStart(2, "0");
  const toggle = (bit) => state.set(state.value ^ (1 << bit));
  const step = (by) => state.set((state.value + by + codes.length) % codes.length);

  const switches = bits.map((bit, i) =>
    h("button", { type: "button", class: "mmu-bit", onclick: () => toggle(i) },
      h("span", { class: "mmu-bit-number" }, `bit ${i}`), h("span", { class: "mmu-bit-name" }, bit.name)));
  const spoken = h("p", { class: "mmu-state", role: "status", "aria-live": "polite" });
  const rows = rules.map((rule) => {
    const verdict = h("td", { class: "mmu-verdict" }), reason = h("td", {});
    return { tr: h("tr", {}, h("th", { scope: "row", title: rule.source }, rule.name), verdict, reason), verdict, reason };
  });
  const undo = h("button", { type: "button", onclick: () => state.undo() }, "Undo");

  const draw = (code) => {
    const { flags, sentence, verdicts } = codes[code];
    switches.forEach((button, i) => button.setAttribute("aria-pressed", code >> i & 1 ? "true" : "false"));
    const heard = rules.map((rule, i) => `${rule.name}: ${verdicts[i].verdict}`).join("; ");
    spoken.replaceChildren(`${hex(code)} ${flags}: ${sentence}`, h("span", { class: "mmu-heard" }, `. ${heard}.`));
    rows.forEach(({ verdict, reason }, i) => {
      verdict.textContent = SIGN[verdicts[i].verdict];
      verdict.dataset.verdict = verdicts[i].verdict;
      reason.textContent = verdicts[i].reason;
    });
    grey(undo, !state.depth);
  };
  const state = history(start, draw);

  el.classList.add("mmu-codes");
  el.append(
    h("div", { class: "mmu-bits", role: "group", "aria-label": "Bits of the error code" }, [...switches].reverse()),
    spoken,
    h("ul", { class: "mmu-legend" }, bits.map((bit) => h("li", {}, h("b", {}, bit.name), ` ${bit.meaning}`)).reverse()),
    h("table", { class: "mmu-table" },
      h("thead", {}, h("tr", {}, ["rule", "verdict", "why"].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", {}, rows.map((row) => row.tr))),
    h("div", { class: "mmu-controls" },
      h("button", { type: "button", onclick: () => step(-1), "aria-label": "Previous code" }, "◀"),
      h("button", { type: "button", onclick: () => step(1), "aria-label": "Next code" }, "▶"),
      undo, h("button", { type: "button", onclick: () => state.reset() }, "Reset"),
      h("span", { class: "mmu-keys" }, "Click or Tab here, then: 0–4 toggle that bit, ← → step, U undo, R reset")));
  onKeys(el, {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), u: () => state.undo(), r: () => state.reset(),
    ...Object.fromEntries(bits.map((_, i) => [String(i), () => toggle(i)])),
  });
  draw(start);
}
export default { render };
