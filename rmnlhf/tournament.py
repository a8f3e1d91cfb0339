"""Rank N candidates with a judge that compares two: double elimination (the paper's use of the GRM for policy training),
single elimination and round robin.

A judge is any callable `compare(pairs) -> verdicts`: it gets all comparisons of one round as [(i, j), ...], candidate i shown
first, and answers each with "A" (the one shown first is better), "B", or None where there is no verdict to read. None is decided
by a seeded coin, and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Compare = Callable[[list[tuple[int, int]]], Sequence[str | None]]


@dataclass
class Standing:
    """ranking: candidates, best first; scores: one per candidate, rank / (n − 1), best 1.0, worst 0.0, ties share their mean;
    judgements: comparisons asked for; coins: those without a verdict; rounds: batches sent to the judge."""

    ranking: list[int]
    scores: list[float]
    judgements: int
    coins: int
    rounds: int


@dataclass
class _Desk:
    """Books one tournament. Who is shown first is decided by a hash of both keys, a rematch is shown the other way round."""

    keys: list[str]
    seed: int
    judgements: int = 0
    coins: int = 0
    rounds: int = 0
    met: Counter = field(default_factory=Counter)

    def bit(self, *what: object) -> int:
        return hashlib.sha256(repr((self.seed, *what)).encode()).digest()[0] & 1

    def play(self, matches: list[tuple[int, int]]):
        """Generator: yields one round as it is to be shown, is sent the verdicts, returns [(winner, loser)]."""
        shown = []
        for i, j in matches:
            i, j = sorted((i, j), key=lambda c: (self.keys[c], c))
            times = self.met[i, j]
            self.met[i, j] += 1
            shown.append((j, i, times) if self.bit("order", self.keys[i], self.keys[j]) ^ (times & 1) else (i, j, times))
        if not shown:
            return []
        verdicts = yield [(i, j) for i, j, _ in shown]
        self.rounds += 1
        self.judgements += len(shown)
        out = []
        for (i, j, times), verdict in zip(shown, verdicts):
            if verdict is None:
                self.coins += 1
                verdict = "AB"[self.bit("coin", self.keys[i], self.keys[j], times)]
            if verdict not in ("A", "B"):
                raise ValueError(f"compare gave {verdict!r}, allowed: 'A', 'B', None")
            out.append((i, j) if verdict == "A" else (j, i))
        return out

    def standing(self, tiers: list[list[int]]) -> Standing:
        """`tiers`: candidates, best first; those of one tier share the mean of their ranks."""
        scores, place = [0.5] * len(self.keys), len(self.keys) - 1
        for tier in tiers if len(self.keys) > 1 else []:
            for c in tier:
                scores[c] = (place - (len(tier) - 1) / 2) / (len(self.keys) - 1)
            place -= len(tier)
        return Standing([c for tier in tiers for c in tier], scores, self.judgements, self.coins, self.rounds)


def _pair_up(pool: list[int], byes: Counter) -> tuple[list[tuple[int, int]], list[int]]:
    """Neighbours meet; of an odd number, the last of those with the fewest byes sits out."""
    pool = list(pool)
    out = []
    if len(pool) % 2:
        out = [min(reversed(pool), key=lambda c: byes[c])]
        byes[out[0]] += 1
        pool.remove(out[0])
    return list(zip(pool[::2], pool[1::2])), out


def _by_victor(rounds: list[list[tuple[int, int]]], champion: int) -> list[list[int]]:
    """Strict order from (victor, eliminated) per round: later rounds are better, within a round those whom a better one beat."""
    ranking = [champion]
    for beaten in reversed(rounds):
        ranking += [loser for _, loser in sorted(beaten, key=lambda m: ranking.index(m[0]))]
    return [[c] for c in ranking]


def _double(desk: _Desk, winners: list[int]):
    losers, byes, out = [], Counter(), []
    while len(winners) > 1 or len(losers) > 1:
        # a lone unbeaten candidate waits for the final: that is no bye
        up, up_bye = _pair_up(winners, byes) if len(winners) > 1 else ([], winners)
        low, low_bye = _pair_up(losers, byes)
        results = yield from desk.play(up + low)
        top, bottom = results[: len(up)], results[len(up) :]
        out.append(bottom)
        winners = up_bye + [w for w, _ in top]
        # those who come down meet those who stayed, in reverse: rematches come late
        stayed, down = [w for w, _ in bottom] + low_bye, [lost for _, lost in top][::-1]
        longer, shorter = (stayed, down) if len(stayed) >= len(down) else (down, stayed)
        losers = [c for pair in zip(longer, shorter) for c in pair] + longer[len(shorter) :]
    champion = winners[0]
    if losers:
        [(first, second)] = yield from desk.play([(champion, losers[0])])
        if first == losers[0]:  # each has one loss now
            [(first, second)] = yield from desk.play([(champion, losers[0])])
        champion = first
        out.append([(first, second)])
    return _by_victor(out, champion)


def _single(desk: _Desk, pool: list[int]):
    byes, out = Counter(), []
    while len(pool) > 1:
        matches, bye = _pair_up(pool, byes)
        out.append((yield from desk.play(matches)))
        pool = bye + [w for w, _ in out[-1]]
    return _by_victor(out, pool[0])


def _everyone(desk: _Desk, order: list[int]):
    played = yield from desk.play([(order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))])
    wins, tiers = Counter(w for w, _ in played), defaultdict(list)
    for c in order:
        tiers[wins[c]].append(c)
    return [tiers[w] for w in sorted(tiers, reverse=True)]


SCHEMES = {"double elimination": _double, "single elimination": _single, "round robin": _everyone}


def together(scheme: str, keys: Sequence[Sequence[str]], compare, seed: int = 0) -> list[Standing]:
    """Several tournaments in step: each call of `compare` holds one round of all that still run, as [(tournament, i, j), ...].

    scheme: a name in SCHEMES. keys: for each tournament its candidates' texts: they seed the bracket and the coins, so that the
    order in which candidates come does not matter. Raises ValueError for an empty tournament or a judge that breaks its form."""
    desks, running, pending, out = [], {}, {}, {}

    def advance(t, verdicts):
        try:
            pending[t] = running[t].send(verdicts)
        except StopIteration as end:
            pending.pop(t, None)
            out[t] = desks[t].standing(end.value)

    for t, names in enumerate(keys):
        names = [str(k) for k in names]
        if not names:
            raise ValueError(f"tournament {t} has no candidate")
        desks.append(_Desk(names, seed))
        order = sorted(range(len(names)), key=lambda i: (hashlib.sha256(f"{seed}:{names[i]}".encode()).digest(), i))
        running[t] = SCHEMES[scheme](desks[t], order)
        advance(t, None)
    while pending:
        asked = [(t, i, j) for t in sorted(pending) for i, j in pending[t]]
        verdicts = list(compare(asked))
        if len(verdicts) != len(asked):
            raise ValueError(f"compare was asked for {len(asked)} verdicts and gave {len(verdicts)}")
        by_tournament = defaultdict(list)
        for (t, _, _), verdict in zip(asked, verdicts):
            by_tournament[t].append(verdict)
        for t, mine in by_tournament.items():
            advance(t, mine)
    return [out[t] for t in range(len(desks))]


def _alone(scheme: str, n: int, compare: Compare, seed: int, keys: Sequence[str] | None) -> Standing:
    if keys is not None and len(keys) != n:
        raise ValueError(f"{len(keys)} keys for {n} candidates")
    return together(scheme, [range(n) if keys is None else keys], lambda asked: compare([(i, j) for _, i, j in asked]), seed)[0]


def double_elimination(n: int, compare: Compare, seed: int = 0, keys: Sequence[str] | None = None) -> Standing:
    """Two losses and a candidate is out: winners' bracket, losers' bracket, grand final, and a second final (bracket reset) where
    the winner of the losers' bracket wins the first. At most 2n − 1 judgements in about 2·log2(n) rounds, both brackets of a
    round in one call. `keys`: see `together`. n = 1 scores 0.5."""
    return _alone("double elimination", n, compare, seed, keys)


def single_elimination(n: int, compare: Compare, seed: int = 0, keys: Sequence[str] | None = None) -> Standing:
    """One loss and a candidate is out: n − 1 judgements."""
    return _alone("single elimination", n, compare, seed, keys)


def round_robin(n: int, compare: Compare, seed: int = 0, keys: Sequence[str] | None = None) -> Standing:
    """Everyone meets everyone, in one round: n(n − 1)/2 judgements; ranked by wins, equal wins share their rank."""
    return _alone("round robin", n, compare, seed, keys)


def agreement(scores: Sequence[float], levels: Sequence[int]) -> float:
    """Share of candidate pairs whose order is known (`levels` differ, higher is better) that `scores` puts in that order; a tie in
    the scores counts half. 0.5 is chance. NaN where no order is known."""
    known = [(i, j) for i in range(len(levels)) for j in range(len(levels)) if levels[i] > levels[j]]
    right = sum(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in known)
    return right / len(known) if known else float("nan")


def ranked_sets(pairs, n: int, sets: int, seed: int = 0) -> list[dict]:
    """Questions with `n` candidates each whose full order follows from pairwise labels.

    Rows of one question (same context) form a graph of preferences between responses. A set is n responses with every pair
    labelled and no cycle, found greedily in an order given by a hash; at most one set for each question first, then further
    disjoint ones. Returns [{context, group, candidates: [text], levels: [int]}] (level n − 1 is best), `sets` of them or fewer."""
    graphs, talks = defaultdict(dict), {}
    for p in pairs:
        key = repr([(t["role"], t["content"]) for t in p.context])
        talks[key] = (p.context, p.group)
        better, worse = (p.response_a, p.response_b) if p.label == "A" else (p.response_b, p.response_a)
        graphs[key][better, worse] = True

    def rank(text):
        return hashlib.sha256(f"{seed}:{text}".encode()).digest()

    used, found = defaultdict(set), []
    for _ in range(sets):  # one pass gives each question one set
        before = len(found)
        for key in sorted(graphs, key=rank):
            edges, chosen = graphs[key], []
            for text in sorted({t for e in edges for t in e} - used[key], key=rank):
                wins = [(text, c) in edges for c in chosen]
                if all(w != ((c, text) in edges) for w, c in zip(wins, chosen)):  # labelled with each, one way only
                    at = [i for i, w in enumerate(wins) if w]  # chosen is kept best first: transitive = a suffix is beaten
                    if at == list(range(len(chosen) - len(at), len(chosen))):
                        chosen.insert(len(chosen) - len(at), text)
                if len(chosen) == n:
                    break
            if len(chosen) == n:
                used[key].update(chosen)
                candidates = sorted(chosen, key=rank)
                levels = [n - 1 - chosen.index(c) for c in candidates]
                found.append({"context": talks[key][0], "group": talks[key][1], "candidates": candidates, "levels": levels})
            if len(found) == sets:
                return found
        if len(found) == before:
            break
    return found


def distractor_sets(pairs, n: int, sets: int, seed: int = 0) -> list[dict]:
    """As `ranked_sets`, for pairs whose questions have two responses only: the better one against the worse one and n − 2
    responses to other questions. Only "better than all others" is known: levels 1 and 0."""
    ordered = sorted(pairs, key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest())
    found = []
    for at, p in enumerate(ordered[:sets]):
        good, bad = (p.response_a, p.response_b) if p.label == "A" else (p.response_b, p.response_a)
        others = [q.response_a for q in ordered[at + 1 :] + ordered[:at] if q.context != p.context]
        candidates = list(dict.fromkeys([good, bad, *others]))[:n]
        candidates.sort(key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
        levels = [int(c == good) for c in candidates]
        found.append({"context": p.context, "group": p.group, "candidates": candidates, "levels": levels})
    return found
