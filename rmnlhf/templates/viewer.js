"use strict";
(() => {
  const root = document.getElementById("list");
  if (!root) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 50, POINT_COLOURS = 6;
  const $ = (id) => document.getElementById(id);
  const group = new Map(); // the same pair across arms
  data.entries.forEach((e, i) => {
    e.index = i;
    const key = e.set + "\n" + e.pair;
    if (!group.has(key)) group.set(key, []);
    group.get(key).push(e);
  });
  let hits = [], page = 0, chosen = null;

  // All text enters the page as text, never as markup.
  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    for (const child of children) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  const chip = (kind, text) => make("span", { class: "chip " + kind }, text);

  // ---- filters
  const state = (j) => (j.verdict === null ? "none" : j.correct ? "right" : "wrong");
  const valid = (e) => e.shown.map((j) => j.verdict).filter((v) => v !== null);
  const changes = (e) => new Set(valid(e)).size > 1;
  const WORD = { right: "✓ right", wrong: "✗ wrong", none: "○ no verdict" };
  const controls = { arm: $("f-arm"), set: $("f-set"), right: $("f-right"), inconsistent: $("f-inconsistent"), source: $("f-source") };
  const source = (e) => (data.pairs[e.pair] || e).source || "unknown";
  for (const [name, of] of [["arm", (e) => e.arm], ["set", (e) => e.set], ["source", source]])
    for (const value of [...new Set(data.entries.map(of))]) controls[name].append(make("option", { value }, value));
  function passes(e) {
    const want = Object.fromEntries(Object.entries(controls).map(([k, c]) => [k, c.value]));
    return (
      (!want.arm || e.arm === want.arm) && (!want.set || e.set === want.set) && (!want.source || source(e) === want.source) &&
      (!want.right || e.shown.some((j) => state(j) === want.right)) &&
      (want.inconsistent !== "process" || e.shown.some((j) => j.inconsistent)) &&
      (want.inconsistent !== "order" || changes(e))
    );
  }
  function refilter() {
    hits = data.entries.filter(passes);
    page = 0;
    choose(hits[0] || null);
  }
  for (const c of Object.values(controls)) c.addEventListener("change", refilter);
  $("filters").addEventListener("reset", () => setTimeout(refilter));
  $("filters").addEventListener("submit", (event) => event.preventDefault());

  // ---- list, by pages
  function drawList() {
    const start = page * PAGE, rows = hits.slice(start, start + PAGE);
    root.replaceChildren(...rows.map((e) => {
      const text = e.shown.map((j) => (j.order === "ab" ? "AB " : "BA ") + WORD[state(j)]).join(" · ");
      return make("li", { role: "option", id: "e" + e.index, "aria-selected": String(e === chosen) },
        make("span", { class: "line" }, make("b", {}, e.arm), make("span", { class: "id" }, e.pair + (e.step == null ? "" : " · step " + e.step))),
        make("span", { class: "line" }, text));
    }));
    if (chosen && rows.includes(chosen)) root.setAttribute("aria-activedescendant", "e" + chosen.index);
    else root.removeAttribute("aria-activedescendant");
    $("count").textContent = hits.length
      ? `${(start + 1).toLocaleString("en")}–${(start + rows.length).toLocaleString("en")} of ${hits.length.toLocaleString("en")} judgements`
      : "No judgement passes these filters";
    $("prev").disabled = page === 0;
    $("next").disabled = start + PAGE >= hits.length;
  }
  function choose(entry) {
    chosen = entry;
    if (entry) page = Math.floor(hits.indexOf(entry) / PAGE);
    drawList();
    drawDetail();
    if (entry) {  // within the list only: the page itself must not jump
      const item = $("e" + entry.index), above = item.offsetTop - root.offsetTop;
      if (above < root.scrollTop) root.scrollTop = above;
      else if (above + item.offsetHeight > root.scrollTop + root.clientHeight) root.scrollTop = above + item.offsetHeight - root.clientHeight;
    }
  }
  root.addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(data.entries[Number(item.id.slice(1))]);
  });
  root.addEventListener("keydown", (event) => {
    const at = hits.indexOf(chosen);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + PAGE, PageUp: at - PAGE, Home: 0, End: hits.length - 1 }[event.key];
    if (to === undefined || !hits.length) return;
    event.preventDefault();
    choose(hits[Math.max(0, Math.min(hits.length - 1, to))]);
  });
  const turn = (by) => choose(hits[(page + by) * PAGE]);
  $("prev").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));

  // ---- the chosen pair
  function drawDetail() {
    const box = $("detail");
    if (!chosen) return box.replaceChildren(make("p", { class: "missing" }, "Nothing chosen."));
    const pair = data.pairs[chosen.pair], parts = [make("h3", {}, `${source(chosen)} · ${chosen.pair}`)];
    if (!pair) parts.push(make("p", { class: "missing" }, "The texts of this pair are not in this run’s splits."));
    else {
      for (const turn of pair.context) parts.push(make("h4", {}, turn.role), make("p", { class: "text" }, turn.content));
      parts.push(make("div", { class: "two" }, response("A", pair), response("B", pair)), make("h3", {}, "Human critiques"), humans(pair));
    }
    parts.push(make("h3", {}, chosen.set === "training" ? "Training rollouts of this pair" : "The same pair across arms"));
    const mates = group.get(chosen.set + "\n" + chosen.pair), cards = [chosen];
    for (const e of mates) if (!cards.some((c) => c.arm === e.arm)) cards.push(e);
    parts.push(make("div", { class: "arms" }, ...cards.map((e) => armCard(e, mates))));
    box.replaceChildren(...parts);
  }
  function response(side, pair) {
    const good = pair.label === side;
    return make("section", { class: "card" }, make("h3", {}, "Response " + side + " ", good ? chip("right", "★ people prefer this one") : null),
      make("p", { class: "text long", tabindex: "0" }, pair[side.toLowerCase()]));
  }
  function humans(pair) {
    if (!pair.critiques.length) return make("p", { class: "missing" }, "None for this pair.");
    const points = [...new Set(chosen.shown.flatMap((j) => j.reference.map((r, i) => [r.text, colourOf(j, i)])).filter(([, k]) => k !== null))];
    return make("div", { class: "two" }, ...pair.critiques.map((c) => make("div", { class: "card" },
      make("p", { class: "text" }, ...marked(c.text, points)),
      make("span", { class: "src" }, "chose " + (c.label || "neither") + (c.label === pair.label ? "" : ", against the gold label")))));
  }
  const colourOf = (j, reference) => {
    const at = j.matches.findIndex((m) => m[1] === reference);
    return at < 0 ? null : at % POINT_COLOURS;
  };
  // Arguments that stand word for word in a text are marked there; the list of points below says the same in words.
  function marked(text, points) {
    let pieces = [text];
    for (const [needle, k] of points)
      pieces = pieces.flatMap((piece) => {
        const at = typeof piece === "string" && needle.length > 3 ? piece.indexOf(needle) : -1;
        return at < 0 ? [piece] : [piece.slice(0, at), make("mark", { class: "k" + k }, needle), piece.slice(at + needle.length)];
      });
    return pieces;
  }

  function armCard(e, mates) {
    const card = make("section", { class: "card" + (e === chosen ? " chosen" : ""), "aria-label": "Arm " + e.arm });
    card.append(make("h3", {}, e.arm + (e === chosen ? " (chosen)" : "") + (e.step == null ? "" : ", step " + e.step)));
    const verdicts = make("p", {});
    for (const j of e.shown)
      verdicts.append(chip(state(j), (j.order === "ab" ? "A shown first: " : "B shown first: ") + (j.verdict ? "prefers " + j.verdict + ", " : "") + WORD[state(j)]));
    if (valid(e).length > 1) verdicts.append(changes(e) ? chip("wrong", "⇄ changes with the order") : chip("none", "= same in both orders"));
    if (e.shown.some((j) => j.inconsistent)) verdicts.append(chip("wrong", "⚠ inconsistent: right verdict, wrong critique"));
    card.append(verdicts);
    e.shown.forEach((j, i) => {
      const body = judgementBody(j);
      card.append(i === 0 ? body : make("details", {}, make("summary", {}, j.order === "ba" ? "Judged with B shown first" : "Judged with A shown first"), body));
    });
    const others = mates.filter((m) => m.arm === e.arm && m !== e).length;
    if (others) card.append(make("p", { class: "src" }, `${others} more rollout${others > 1 ? "s" : ""} of this arm in the list`));
    return card;
  }
  function judgementBody(j) {
    const points = j.matches.map((m, k) => [(j.arguments[m[0]] || { text: "" }).text, k % POINT_COLOURS]);
    const body = make("div", {});
    if (j.error) body.append(make("p", { class: "warn" }, "No verdict: " + j.error));
    body.append(make("p", { class: "text long", tabindex: "0" }, ...marked(j.critique || j.text || "(empty)", points)));
    if (j.arguments.length || j.reference.length) body.append(make("h4", {}, "Points: model beside human"), pointList(j));
    body.append(rewardTable(j));
    return body;
  }
  function argument(who, a) {
    const tags = [a.side && a.side !== "both" ? "about " + a.side : a.side ? "about both" : null,
      a.polarity > 0 ? "praise" : a.polarity < 0 ? "blame" : null, a.core ? "core" : null].filter(Boolean);
    return make("div", { class: "side" }, make("span", { class: "who" }, who + (tags.length ? " · " + tags.join(", ") : "")), a.text);
  }
  const nothing = (who, text) => make("div", { class: "side missing" }, make("span", { class: "who" }, who), text);
  function pointList(j) {
    const list = make("ul", { class: "points" });
    j.matches.forEach(([g, r, score], k) => {
      if (!j.arguments[g] || !j.reference[r]) return;
      const how = score == null ? "" : ` (${Number(score).toFixed(2)})`;
      list.append(make("li", { class: "k" + (k % POINT_COLOURS) }, make("span", { class: "state" }, `✓ matched, point ${k + 1}${how}`),
        argument("model", j.arguments[g]), argument("human", j.reference[r])));
    });
    const said = new Set(j.matches.map((m) => m[0])), heard = new Set(j.matches.map((m) => m[1]));
    j.arguments.forEach((a, i) => {
      if (!said.has(i)) list.append(make("li", {}, make("span", { class: "state none" }, "+ unmatched: no human counterpart"), argument("model", a), nothing("human", "–")));
    });
    j.reference.forEach((a, i) => {
      if (!heard.has(i)) list.append(make("li", {}, make("span", { class: "state wrong" }, "− missed: not in the model’s critique"), nothing("model", "–"), argument("human", a)));
    });
    return list;
  }
  function rewardTable(j) {
    const NAMES = { outcome: "outcome reward", process: "process (core-F1)", metarm: "MetaRM", reward: "total reward" };
    const named = Object.entries(j.rewards).map(([k, v]) => [NAMES[k] || k, v]);
    const rows = [...named, ["precision", j.precision], ["recall", j.recall], ["core-F1", "process" in j.rewards ? null : j.f1]].filter(([, v]) => v !== null && v !== undefined);
    if (!rows.length) return make("p", { class: "missing" }, "No process figures: this pair has no human critique.");
    return make("table", { class: "rewards" }, make("tbody", {}, ...rows.map(([k, v]) => make("tr", {}, make("th", { scope: "row" }, k), make("td", {}, Number(v).toFixed(3))))));
  }

  refilter();
  document.documentElement.dataset.viewer = "ready";
})();
