"""A critique → arguments: what is said, about which response, as praise or blame, and whether it decides.

Offline, an argument is a clause. Sides are read from mentions ("Response A", "the second answer", "it"), polarity from a
lexicon with the scope of negation; nothing here needs a model. The LLM backend asks a judge for the same fields (JSON schema).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from nltk.stem.porter import PorterStemmer
from sentencex import segment

from .pairs import OTHER

Side = Literal["A", "B", "both"]


@dataclass(frozen=True)
class Argument:
    """One reason. `polarity`: 1 praise, -1 blame, 0 neither (a bare description). `core`: it justifies the choice.

    `members`: the wordings of all annotators who raised it (merged references only; otherwise its own text)."""

    text: str
    side: Side | None
    polarity: int
    core: bool = False
    members: tuple[str, ...] = field(default=(), compare=False, repr=False)
    bare: bool = field(default=False, compare=False, repr=False)  # a verdict without a reason: all that its critique says

    @property
    def supports(self) -> str | None:
        """The response that this argument speaks for: praise of A and blame of B both speak for A."""
        if self.side not in OTHER or not self.polarity:
            return None
        return self.side if self.polarity > 0 else OTHER[self.side]


# ---- lexicon: aspect: words of praise | words of blame. Stems are compared, so one form of a word is enough. -------------
_LEXICON = """
accuracy: correct accurate right true truthful precise exact valid proper sound realistic verify faithful authentic | incorrect
  inaccurate wrong false untrue erroneous mistaken mistake error hallucinate hallucination fabricate fabricated misleading flawed flaw
  invalid misinformation bug buggy fault faulty inaccuracies miscalculate misstate imprecise nonexistent bogus misrepresent distort unfaithful misinterpret misunderstand misunderstood misconception
evidence: evidence fact factual proof prove support statistic data cite citation source reference example research study
  backed substantiate substantiated concrete | opinion unsupported unproven baseless unsubstantiated unfounded assertion
  speculation speculative hearsay assumption
detail: detail elaborate depth thorough explain explanation specific comprehensive complete completeness information informative insight
  insightful extensive expand robust substance rich nuance nuanced context point reason cover meaningful
  deep | vague brief short shallow simplistic incomplete partial superficial oversimplify sparse empty omit
  missing general generic minimal skip overlook
clarity: clear clearly clarity understandable coherent readable legible comprehensible articulate eloquent lucid plain cohesive fluent
  understand straightforward easy | unclear confusing confuse incoherent ambiguous garbled nonsense nonsensical ramble rambling muddled
  incomprehensible convoluted unintelligible gibberish hard difficult obscure cryptic disjointed
relevance: relevant topic address answer focus focused direct directly pertinent stick | irrelevant unrelated tangent tangential digress
  off-topic sidetrack beside stray evade dodge sidestep deviate unnecessary needless
logic: logical logic reasoning reasoned rational sense sensible persuasive compelling thoughtful consistent plausible | illogical fallacy
  fallacious contradictory contradict contradiction inconsistent inconsistency irrational senseless absurd hypocritical circular
grammar: grammar grammatical well-written punctuation spelling | typo misspell misspelled misspelling ungrammatical slang grammatically-incorrect
structure: structure structured organized organised format formatted formatting bullet heading layout well-organized tidy readability |
  disorganized unorganized unstructured unformatted messy cluttered sloppy
instruction: follow adhere respect honour honor obey fulfill fulfil meet satisfy comply requirement instruction request constraint prompt | violate ignore disregard break
  unrequested unprompted
concise: concise succinct simple to-the-point brevity compact crisp | verbose wordy long-winded lengthy repetitive redundant repetition redundancy
  repeat bloated verbosity
tone: polite courteous respectful considerate friendly kind professional calm objective neutral balanced mature warm empathetic empathy unbiased fair civil |
  rude offensive insult insulting aggressive biased bias attack demeaning inappropriate unprofessional emotional sarcastic
  sarcasm immature childish hostile judgmental derogatory mock ridicule preachy condescending arrogant profanity vulgar disrespectful inflammatory juvenile joke curse defensive
safety: safe harmless ethical responsible | harmful unsafe dangerous unethical illegal toxic
helpfulness: helpful useful practical actionable applicable usable effective beneficial | unhelpful useless impractical ineffective refusal
  refuse decline unusable pointless
creativity: creative original engaging interesting vivid imaginative unique memorable fun | boring dull bland unoriginal cliche
credibility: credible credibility authority experience expert trustworthy reliable knowledgeable confident | unreliable dubious
function: work run compile functional execute scalable efficient | broken crash inefficient fail
overall: better best good solid satisfy valued great superior convincing strong stronger preferable excellent nice perfect impressive valuable appropriate well
  decent success successful improve | worse worst bad badly poor poorly weak disappoint mediocre horrific meaningless nonsensically weaker inferior terrible awful horrible unconvincing lacking lame
  problem problematic issue ridiculous stupid silly unacceptable disappointing fatal
"""
_WEAK = "provide give offer include contain state show present mention discuss describe acknowledge use bring propose suggest recommend"
_ANTONYMS = """increase decrease, before after, above below, long short, high low, hot cold, always never, include exclude, accept reject,
allow forbid, win lose, buy sell, rise fall, start end, begin finish, open close, maximum minimum, positive negative, agree disagree,
legal illegal, possible impossible, present absent, early late, male female, even odd, support oppose, add subtract, add remove, multiply
divide, north south, east west, day night, old new, old young, big small, large small, fast slow, love hate, remember forget, upper
lower, import export, public private, input output, ascending descending, horizontal vertical, inside outside, internal external, forward
backward, formal informal, active passive, mandatory optional, convex concave, directly inversely, top bottom, left right, gain loss, cheap
expensive, hero villain, guilty innocent, alive dead, full empty, wet dry, light dark, light heavy, wide narrow, thick thin, deep shallow,
raise reduce, grow shrink, expand contract, encourage discourage, approve disapprove, connect disconnect, enable disable, encrypt decrypt,
clockwise counterclockwise, freeze melt, sharp blunt, broad narrow, major minor, simple complex, simple complicated, easy hard, easy difficult, true false,
correct incorrect, correct wrong, right wrong, accurate inaccurate, clear unclear, clear confusing, relevant irrelevant, logical illogical,
concise verbose, concise wordy, detailed vague, specific vague, specific generic, safe unsafe, safe dangerous, helpful unhelpful, useful
useless, consistent inconsistent, consistent contradictory, organized disorganized, structured unstructured, polite rude, respectful
disrespectful, objective biased, strong weak, good bad, better worse, best worst, superior inferior, valid invalid, complete incomplete,
fact opinion, creative bland, interesting boring, coherent incoherent, professional unprofessional, appropriate inappropriate, credible
dubious, effective ineffective, efficient inefficient, answer dodge, follow ignore, address ignore, include omit, mention omit, keep drop,
convincing unconvincing, persuasive unpersuasive, harmless harmful, balanced biased, calm aggressive, grammatical ungrammatical,
supported unsupported, reliable unreliable, necessary unnecessary, brief lengthy, thorough superficial, deep superficial, more less, more fewer"""
_NEGATORS_WORDS = """not no never without lack lacks lacking lacked neither nor cannot fail fails failed failing failure less fewer hardly barely omit
omits omitted omitting absence absent avoid avoids avoided avoiding free unable nothing none zero devoid refuses refused refuse
unlike insufficient miss misses missing missed ignore ignores ignored ignoring forgets forgot overlooks neglects neglected
neglect disregards disregard disregarded declines decline declined dismisses excludes rather instead didn't doesn't don't isn't wasn't aren't weren't won't can't couldn't wouldn't shouldn't hasn't haven't
needn't doesnt dont isnt didnt wasnt cant wont"""
_NEGATORS = set(_NEGATORS_WORDS.split())
_BLAMING_WORDS = """not no never without lack lacks lacking lacked neither nor cannot fail fails failed failing failure hardly barely omit omits
omitted omitting absence unable nothing none refuses refused refuse insufficient miss misses missing missed ignore ignores ignored
ignoring forgets forgot overlooks neglects neglected neglect didn't doesn't don't isn't wasn't aren't weren't won't can't couldn't
doesnt dont isnt didnt wasnt cant wont"""
_CARRIERS_WORDS = """fact information detail point example reason explanation explain evidence answer source claim statement response reasoning
sense topic support context prompt request instruction requirement constraint proof opinion right direct work spelling grammar format formatting
layout issue logic structure clarity readability punctuation factual grammatical logical objective"""
_BLAMING = set(_BLAMING_WORDS.split())
_STOP_WORDS = """a an the of to in on at by for from with as is are was were be been being am it its this that these those which who whom whose
what and or but if then than so because since while whereas although though however also just even only very much quite more most
less too do does did done doing have has had having will would can could should may might must i me my we our you your he him his
she her they them their there here s t into about over under up down out off again once both each other one ones such own same all
any some few response responses argument arguments answer answers one two way like make makes made get gets got sidea sideb other
besides overall rather instead not no never without neither nor cannot"""
_STOP = set(_STOP_WORDS.split())
_COUNTING = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty"""
_OTHER_NUMBERS = """thirty=30 forty=40 fifty=50 sixty=60 seventy=70 eighty=80 ninety=90 hundred=100 thousand=1000 million=1000000
billion=1000000000 dozen=12 twice=2 thrice=3 half=0.5 third=3rd fourth=4th fifth=5th"""
_NUMBER_WORDS = {w: str(i) for i, w in enumerate(_COUNTING.split())} | dict(w.split("=") for w in _OTHER_NUMBERS.split())

_stemmer = PorterStemmer()
_OWN_STEM = {w: w for w in ("useful", "useless", "helpful", "helpless", "responsible", "originated", "factor", "kindness")}
_OWN_STEM |= {"kind": "kindly", "kinds": "kindly"}


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Porter's stem, an adverb's as its adjective's; but for words that it would join with another meaning ("useful" with "use")."""
    if word.endswith("ly") and len(word) > 5:
        word = word[:-3] + "y" if word.endswith("ily") else word[:-2]
    return _OWN_STEM.get(word) or _stemmer.stem(word)


def _read_lexicon():
    sign, aspects = {}, {}
    for line in re.sub(r"\n  +", " ", _LEXICON.strip()).splitlines():
        aspect, words = line.split(":", 1)
        for polarity, part in zip((1, -1), words.split("|")):
            for word in part.split():
                sign.setdefault(stem(word), polarity)
                aspects.setdefault(stem(word), aspect)
    antonym = {}  # stem -> (canonical stem, sign)
    for pair in _ANTONYMS.replace("\n", " ").split(","):
        one, other = (stem(w) for w in pair.split())
        root, root_sign = antonym.get(one, (one, 1))
        antonym.setdefault(one, (root, root_sign))
        antonym.setdefault(other, (root, -root_sign))
    return sign, aspects, antonym


_SIGN, _ASPECT, _ANTONYM = _read_lexicon()
_CARRIERS = {stem(w) for w in _CARRIERS_WORDS.split()}  # their sign yields to a word beside them: "wrong facts", "good spelling"
_MENDING = {stem(w) for w in ("address", "resolve", "fix", "correct", "identify", "recognize", "recognise", "acknowledge", "handle", "solve")}
_INTENSIFIERS = {"completely", "strongly", "truly", "perfectly"}
_PARTICIPLES = {"missing", "missed", "absent", "lacking", "omitted", "ignored", "neglected", "forgotten", "overlooked"}
_BELITTLING = {"just": 0.35, "only": 0.35, "merely": 0.6}
_WEAK_STEMS = {stem(w) for w in _WEAK.split()}


@dataclass(frozen=True)
class Claim:
    """What a clause says, ready to be compared. `concepts`: stem → 1, or -1 where it is negated or the antonym is said."""

    concepts: dict[str, int]
    numbers: frozenset[str]
    names: frozenset[str]
    aspects: frozenset[str]
    evaluation: float  # > 0 praise, < 0 blame
    comparative: bool
    words: frozenset[str]
    weights: dict[str, float]  # of each concept: 1 what this pair is about, less for the vocabulary of every critique


_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*|\d[\d,]*\.?\d*%?")
_COMPARATIVE = re.compile(r"\b(?:than|more|less|fewer|most|unlike|compared|whereas|while|instead|rather|better|worse|\w{3,}er)\b", re.IGNORECASE)
# a clause that measures the response against what was due
_DUE = r"(?:asked|wanted|needed|requested|required|expected|called for)"
_AMISS = re.compile(
    rf"\bshould(?:\s+\w+)? have\b|\b(?:not|nobody|no one|never|n't)\b(?:\s+\w+)?\s+{_DUE}\b|\b(?:although|while|where|but|though)\b[^,;]*\b(?:was|were|is|are)\s+{_DUE}\b"
    rf"|\b(?:is|was|are|were|seems?|feels?|sounds?) off\b|\bbut (?:the|its) (?:question|request|task|prompt|topic|instruction)s? (?:is|was|were|asks|asked)\b"
    rf"|\bagainst (?:the|its|all|any) (?:premises?|evidence|facts?|rules?|instructions?|request|data)\b",
    re.IGNORECASE,
)
_APT = re.compile(rf"(?<!not )\b(?:as (?:required|requested|asked|expected|instructed|it (?:should|must))|(?:what|that) (?:was|is|were) {_DUE})\b", re.IGNORECASE)
_QUOTED = re.compile(r"[\"“”`]([^\"“”`]{2,60})[\"“”`]")


@lru_cache(maxsize=200_000)
def analyse(text: str) -> Claim:
    """The claim of one clause, sides masked as SIDEA, SIDEB."""
    tokens = [(m[0].replace("’", "'"), m.start(), m.end()) for m in _WORD.finditer(text)]
    concepts, numbers, names, aspects, words = {}, set(), set(), set(), []
    total, carried, judged, scope, reach, mended, substance = 0.0, 0.0, False, 1, 0, -9, False
    for i, (token, start, _) in enumerate(tokens):
        low = token.lower().removesuffix("'s")
        if i and re.search(r"[,;:.]|\bbut\b", text[tokens[i - 1][2] : start]) or low in ("but", "and") and reach <= 2:
            scope, reach = 1, 0
        if token in ("SIDEA", "SIDEB"):
            continue
        if low[0].isdigit():
            numbers.add(low.rstrip(".%").replace(",", "") + ("%" if low.endswith("%") else ""))
            words.append(low)
            continue
        after = tokens[i + 1][0].lower() if i + 1 < len(tokens) else ""
        if low in _NUMBER_WORDS and not (low == "one" and (i == 0 or after in ("of", "that", "is") or tokens[i - 1][0].lower() in _STOP)):
            numbers.add(_NUMBER_WORDS[low])
        negates = low in _NEGATORS or low.endswith("n't") or low in ("hard", "difficult") and after == "to"
        if low == "not" and after == "only" or low == "free" and after != "of":
            negates = False
        root = stem(low)
        sign, aspect, (concept, flip) = _SIGN.get(root), _ASPECT.get(root), _ANTONYM.get(root, (root, 1))
        if sign is None and low not in _STOP and (base := _unprefixed(low)):  # an antonym of the word that the lexicon knows
            sign, aspect, (concept, flip) = -_SIGN[base], _ASPECT[base], _ANTONYM.get(base, (base, 1))
            flip = -flip
        said = scope * flip
        if low not in _STOP and not (negates and low != "hard" and low != "difficult"):
            words.append(low)
            concepts[concept] = said if concepts.get(concept, said) == said else 0
            if token[0].isupper() and i and not re.search(r"[.!?:\"“]\s*$", text[:start]):
                names.add(low)
        if sign and not negates:
            aspects.add(aspect)
            weight = 0.6 if aspect == "overall" else 1.0 if sign > 0 else 1.2
            if sign < 0 and i - mended <= 3 or low in _INTENSIFIERS:  # "addresses the ambiguity", "completely wrong"
                weight = 0.0
            if root in _CARRIERS:
                carried += weight * sign * scope
            else:
                total += weight * sign * scope
                judged = judged or weight > 0
        elif low in _BELITTLING and scope > 0 and i and tokens[i - 1][0].lower() != "the":
            total -= _BELITTLING[low]
        elif root in _WEAK_STEMS and not negates:
            total += 0.3 * scope
        if low == "too" and after not in ("", "and") and (i + 2 < len(tokens) or after not in _STOP) and i > 0:
            total -= 1.5
        if root in _MENDING:
            mended = i
        if negates:
            twice = scope < 0 and reach > 0  # "does not fail to"
            scope, reach = (1, 5) if twice else (-1, 6)
            if twice:
                total += 0.65
            elif low in ("less", "fewer") and after in ("", "than") and total + carried > 0:  # "explains less"
                total, carried = -total, -carried
            elif low in _PARTICIPLES and i and tokens[i - 1][0].lower() in ("is", "are", "was", "were", "be", "been"):  # "the layout is missing"
                total, carried = -abs(total) - 0.35, -abs(carried)
            elif low in _BLAMING or low.endswith("n't"):
                substance = True
                total -= 0.35
        elif reach:
            reach -= 1
            if not reach:
                scope = 1
    # a quotation is a name
    for quoted in _QUOTED.findall(text):
        names.add(quoted.lower().strip(" .,"))
    if not judged:  # else a carrier's sign yields: "wrong facts", "the format is wrong"
        total += carried
    if _AMISS.search(text):
        total = -abs(total) - 0.6
    elif _APT.search(text):
        total += 0.6
    if substance and not aspects and total == 0:
        total = -0.35
    weights = {c: 0.3 if c in _WEAK_STEMS else 0.5 if c in _SIGN else 1.0 for c in concepts}
    comparative = bool(_COMPARATIVE.search(text))
    return Claim(concepts, frozenset(numbers), frozenset(names), frozenset(aspects), total, comparative, frozenset(words), weights)


def _unprefixed(word: str) -> str | None:
    """Stem of "helpful" for "unhelpful", where the lexicon has it."""
    m = re.match(r"(?:un|in|im|ir|il|dis|non-?|mis)(\w{4,})$", word)
    return stem(m[1]) if m and stem(m[1]) in _SIGN else None


# ---- from text to clauses ---------------------------------------------------------------------------------------------
_NOUN = r"(?:responses?|answers?|solutions?|assistants?|arguments?|options?|outputs?|candidates?|repl(?:y|ies)|arg\.?|completions?|models?|critiques?)"
_VERBISH = (
    r"(?:is|was|has|had|does|did|gives?|gave|provides?|lacks?|fails?|contains?|includes?|uses?|shows?|makes?|offers?|explains?|states?|"
    r"ignores?|answers?|addresses|can|could|would|should|also|clearly|correctly|only|better|just|better|says?|never|not|goes|"
    r"misses|follows|violates|wins?|covers?|mentions?|'s|doesn't|isn't|didn't)\b"
)
_MENTIONS = [
    (re.compile(rf"@?\b{_NOUN}\s+[#(]?(?:A|1)\)?\s*(?:and|&|or|,)\s*[#(]?(?:B|2)\b\)?", re.IGNORECASE), " BOTHSIDES "),
    (re.compile(rf"@?\b(?:the\s+)?{_NOUN}\s*[#(\[]?\s*(?:(?-i:A)|a(?=\s+{_VERBISH}|\s*(?:[,.;:)\]]|$))|1|one(?!\s+(?!{_VERBISH})[a-z]))\b[)\]]?(?!\s+of)", re.IGNORECASE), " SIDEA "),
    (re.compile(rf"@?\b(?:the\s+)?{_NOUN}\s*[#(\[]?\s*(?:B|2|two(?!\s+(?!{_VERBISH})[a-z]))\b[)\]]?", re.IGNORECASE), " SIDEB "),
    (re.compile(rf"\bthe\s+(?:first|former|1st)(?:\s+(?:{_NOUN}|one|text|author|writer))?(?=\s+{_VERBISH}|[\s,]*(?:and|but|while|,|\.|$))", re.IGNORECASE), " SIDEA "),
    (re.compile(rf"\bthe\s+(?:second|latter|2nd)(?:\s+(?:{_NOUN}|one|text|author|writer))?(?=\s+{_VERBISH}|[\s,]*(?:and|but|while|,|\.|$))", re.IGNORECASE), " SIDEB "),
    (re.compile(rf"\b(?:the\s+)?(?:first|former|1st)\s+{_NOUN}", re.IGNORECASE), " SIDEA "),
    (re.compile(rf"\b(?:the\s+)?(?:second|latter|2nd)\s+{_NOUN}", re.IGNORECASE), " SIDEB "),
    (re.compile(rf"\b(?:[Aa]1\b|[Aa]\s1\b(?=\s*{_VERBISH})|A\b(?=\s*{_VERBISH})|(?<=[a-z,] )A\b(?!\s+[a-z]+\s+(?:of|is|that)\b))"), " SIDEA "),
    (re.compile(rf"\b(?:[Aa]2|[Aa]\s2(?=\s*{_VERBISH})|B)\b(?![.'-]\w|\+\+)"), " SIDEB "),
    (re.compile(rf"\b(?:(?:both|neither)(?:\s+of)?(?:\s+(?:the|these))?(?:\s+(?:{_NOUN}|them))?|(?:the two|each)\s+{_NOUN})\b", re.IGNORECASE), None),
]
_LIST_MARK = re.compile(r"^\s*(?:[-*•–>#]+|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
_VERDICT = re.compile(
    r"^\W*(?:(?:so|overall|thus|therefore|hence|in conclusion|in summary|i (?:think|believe|feel)(?: that)?|to me)\W+)*"
    r"(?:(?P<who>SIDE[AB]|it)\s+(?:is|was|seems|feels|has|makes|gives|provides|looks|does|wins|i think is)\b\s*"
    r"(?:(?:a|an|the|by|far|slightly|much|clearly|significantly|way|definitely|overall|somewhat|marginally|just|also|simply|even|lot|"
    r"little|bit|considerably|only|more|most|many|very|to be)\s+)*"
    r"(?:better|best|stronger|strongest|superior|preferable|preferred|convincing|persuasive|winner|favou?red|good|great)?"
    r"(?:\s+(?:response|answer|argument|choice|option|one|point|case|overall|job|to me|in general))*"
    r"(?:\s+for me)?"
    r"|(?:(?:i\s+)?(?:would\s+|'d\s+|will\s+|'ll\s+)?(?:prefer|choose|chose|pick|favou?r|vote for|go (?:with|for)|like)|my (?:choice|pick|vote|preference) (?:is|goes to|would be))"
    r"\s+(?P<liked>SIDE[AB])(?:\s+(?:more|better))?)"
    r"(?:\s+(?:than|over|to|compared to)\s+(?:SIDE[AB]|the other(?:\s+\w+)?))?"
    r"(?P<mark>\s*(?:[.:!]*\s*$|[,;:.]?\s*(?:because|since|as|due to|for (?:a few reasons|the following reasons)\W*|in that|given that|mainly because|by|for)\b(?:\s+of)?|[,;:]))",
    re.IGNORECASE,
)
_BETTER = re.compile(r"better|best|stronger|strongest|superior|prefer|convinc|persuasive|winner|favou?r|choose|chose|choice|pick|vote|go with|go for|wins|good|great|like", re.IGNORECASE)
_CONTRAST = re.compile(
    r"\s*(?:;|\s[—–-]\s|(?:,\s*)?\b(?:while|whereas|but|however|although|though|yet|on the other hand|in contrast|nevertheless|nonetheless|albeit)\b,?)\s*",
    re.IGNORECASE,
)
_CONCEDES = re.compile(r"\b(?:although|though|despite|even though|albeit|even if|admittedly)\b|^\W*while\b|\b(?:slight|slightly|minor|nitpick|small issue|little)\b", re.IGNORECASE)
_FATAL = re.compile(r"\bfatal|deal[- ]?breaker|disqualif|(?:critical|decisive|unforgivable|catastrophic)\s+(?:error|flaw|mistake|issue|problem|failure|bug|fault|defect)|showstopper", re.IGNORECASE)
_VERBS = (
    r"(?:is|are|was|were|has|have|had|does|do|did|gives?|gave|provides?|provided|lacks?|fails?|contains?|includes?|uses?|shows?|makes?|"
    r"offers?|explains?|states?|ignores?|answers?|addresses|follows?|adheres?|meets?|avoids?|covers?|mentions?|presents?|cites?|omits?|"
    r"misses|violates?|adds?|supports?|goes|talks?|seems?|appears?|can|could|would|should|repeats?|refuses?|asks?|tries|attempts?|"
    r"maintains?|keeps?|brings?|describes?|discusses|demonstrates?|acknowledges?|suggests?|hallucinates?|attacks?|insults?|rambles?|"
    r"contradicts?|delivers?|sticks?|stays?|reads?|sounds?|feels?|flows?|works?|runs?|crashes|produces?|returns?|doesn't|isn't|didn't|"
    r"focuses|relies|gets|creates?|completely|fully|clearly|correctly|accurately|incorrectly|properly|never|not)"
)
_JOINED = re.compile(rf"(?:,\s*(?:and|or|as well as)?\s*|\s+and\s+(?:also\s+|then\s+)?)(?=(?:it\s+|also\s+|they\s+)?{_VERBS}\b)", re.IGNORECASE)
_STOP_BEFORE_SIDE = re.compile(r"(?<=[a-z][.!?])\s+(?=(?:The \w+ (?:of|in) )?SIDE[AB]\b)")  # "wins for me. SIDEB": to the segmenter an abbreviation
_OPENING = re.compile(r"\W*(?:for|with|in|from|by|given|after|before|without|regarding|on|at|when|saying)\b(?!.*\b(?:is|are|was|were|has|have|does|do)\b)", re.IGNORECASE)
_EXPECTED = re.compile(rf"\b(?:was|were|is|are)\b[^,;]*\b{_DUE}\b|\bthe (?:question|request|task|prompt) (?:was|is)\b", re.IGNORECASE)
_DONE_BY = re.compile(r"\s*(?:is|are|was|were)\s+\w+\s+(?:by|in)\s+SIDE")  # its subject stands before it: "the answer, a mammal, is given by SIDEA"
_BEFORE_SIDE = re.compile(r"(?:,\s*(?:and\s+)?|\s+and\s+|\s+because\s+|\s+since\s+)(?=(?:SIDE[AB]|it)\s+(?!and\b|or\b)\w)")
_LISTED = re.compile(r"(?:\s*,\s*(?:and\s+|or\s+|as well as\s+)?|\s+and\s+|\s+as well as\s+|\s+nor\s+)", re.IGNORECASE)
_EXCLUDED = re.compile(r"\b(?:than|unlike|compared (?:to|with)|over|versus|vs\.?|from|to|in contrast to|as opposed to|rather than|instead of|of|with)\s+(?:that of\s+|the other\s+)?$", re.IGNORECASE)
_DISCOURSE = re.compile(
    r"\W*(?:in (?:contrast|addition|conclusion|summary|short|general|comparison)|moreover|furthermore|meanwhile|alternatively|additionally|on the other hand|also|"
    r"overall|therefore|thus|hence|first(?:ly)?|second(?:ly)?|finally|lastly|thought process|let me think|let's think)\b\W*", re.IGNORECASE)  # fmt: skip
_SUBJECT = re.compile(r"\b(?:SIDEA|SIDEB|BOTHSIDES)\b")
_HEAD = re.compile(r"^\W*(?:SIDE[AB]|it|BOTHSIDES)?\W*(?:also\s+)?((?:does not|doesn't|did not|didn't|is not|isn't|lacks?|lacking|has no|have no|without|fails? to \w+|fails?|failed to \w+|misses|missing|ignores?|omits?|no|not|less|fewer|too|more)\b)", re.IGNORECASE)


def mask_sides(text: str) -> str:
    """Every way to name a response → SIDEA, SIDEB or BOTHSIDES."""
    text = re.sub(r"\boff[ -]?topic\b", "irrelevant", re.sub(r"\b(?:kind|sort) of\b", "somewhat", text), flags=re.IGNORECASE)
    for pattern, token in _MENTIONS:
        text = pattern.sub(token or (lambda m: " BOTHSIDES " + ("not " if m[0].lower().startswith("neither") else "")), text)
    return re.sub(r"[ \t]+", " ", text)


def _clauses(sentence: str) -> list[str]:
    """Clauses of one masked sentence."""
    parts = [sentence]
    for pattern in (_CONTRAST, _BEFORE_SIDE, _JOINED):
        parts = [p for part in parts for p in _split(pattern, part)]
    return [p for part in parts for p in _listing(part)]


def _split(pattern, text):
    """Parts of a sentence; what opens a clause ("for a formal message, …"), what was due and a passive's subject stay with their neighbour."""
    out, last = [], 0
    for m in pattern.finditer(text):
        before, after = text[last : m.start()], text[m.end() :]
        if _OPENING.match(before) or _EXPECTED.search(before if not _SUBJECT.search(before) else "") or _EXPECTED.search(after) and not _SUBJECT.search(after):
            continue
        if _DONE_BY.match(after) and not _SUBJECT.search(before):
            continue
        if len(re.findall(r"[A-Za-z]{3,}", before)) >= 1:
            out.append(text[last : m.start()])
            last = m.end()
    out.append(text[last:])
    return [p for p in (p.strip(" ,;") for p in out) if re.search(r"\w", p)]


def _listing(clause):
    """ "lacks clarity, evidence and structure" → three clauses, where each piece names an aspect of its own."""
    pieces = [p for p in _LISTED.split(clause) if p and p.strip()]
    if len(pieces) < 2:
        return [clause]
    aspects = [analyse(p).aspects - {"overall"} for p in pieces]
    if not all(aspects) or len(set().union(*aspects)) < len(pieces):
        return [clause]
    head = _HEAD.match(pieces[0])
    lead = head[1] + " " if head else ""
    return [pieces[0]] + [p if _HEAD.match(p) else lead + p for p in pieces[1:]]


def extract(critique: str, backend: str = "offline", judge=None) -> list[Argument]:
    """Arguments of one critique, in reading order; the same point said twice in the same words counts once.

    `core`: it justifies the choice. That is what praises or blames, is not conceded ("although …", "slightly") and, where the
    critique says which response is better, speaks for that one; a fatal error, where named, is the only core argument; where
    nothing qualifies every argument is core. backend "llm" asks `judge` (see `ask`) and returns [] where it gave no answer."""
    if backend == "llm":
        found = ask([critique], judge)[0]
        return found or []
    if backend != "offline":
        raise ValueError(f"backend {backend!r}: allowed are 'offline' and 'llm'")
    return list(_extract(critique))


def extract_many(critiques: Iterable[str]) -> list[list[Argument]]:
    return [list(_extract(c)) for c in critiques]


def repetition(critique: str) -> int:
    """How often the critique makes its most repeated point, word for word."""
    counts: dict = {}
    for argument in _read(critique)[0]:
        counts[_key(argument)] = counts.get(_key(argument), 0) + 1
    return max(counts.values(), default=0)


def _key(argument):
    return (argument.side, argument.polarity, re.sub(r"\W+", " ", argument.text.lower()).strip())


@lru_cache(maxsize=100_000)
def _extract(critique: str) -> tuple[Argument, ...]:
    found, winner, conceded, fatal = _read(critique)
    unique: dict = {}
    for i, argument in enumerate(found):
        unique.setdefault(_key(argument), (argument, i in conceded, i in fatal))
    kept = list(unique.values())
    core = [f for _, _, f in kept] if any(f for _, _, f in kept) else [
        a.polarity != 0 and not weak and (winner is None or a.supports in (None, winner)) for a, weak, _ in kept
    ]  # fmt: skip
    if not any(core):
        core = [True] * len(kept)
    return tuple(Argument(a.text, a.side, a.polarity, c, (a.text,), a.bare) for (a, _, _), c in zip(kept, core))


def _read(critique: str):
    """All clauses as arguments, the response that the critique calls better, indices of conceded and of fatal ones."""
    found, conceded, fatal = [], set(), set()
    winner = subject = None
    bare = []
    for line in critique.splitlines():
        line = mask_sides(_LIST_MARK.sub("", line)).strip()
        if not line:
            continue
        for sentence in (part for found_ in segment("en", line) for part in _STOP_BEFORE_SIDE.split(found_)):
            sentence = sentence.strip()
            verdict = _VERDICT.match(sentence)
            if verdict and _BETTER.search(verdict[0]):
                who = verdict["who"] or verdict["liked"]
                who = who[-1] if who and who.upper().startswith("SIDE") else subject
                rest = sentence[verdict.end() :].strip(" ,.;:")
                if who in OTHER:
                    winner, subject = winner or who, who
                if len(re.findall(r"[A-Za-z]{2,}", rest)) < 2:
                    if re.search(r"[A-Za-z]", sentence):
                        bare.append(Argument(sentence, who, 1, bare=True))
                    continue
                sentence = rest
            for clause in _clauses(sentence):
                if not re.search(r"[^\W\d_]{2,}", clause) or re.fullmatch(r"[\w\s]{0,30}:", clause.strip()):
                    continue
                if _DISCOURSE.fullmatch(clause):
                    continue
                side = _side(clause, subject or winner)
                if side in OTHER:
                    subject = side
                claim = analyse(clause)
                polarity = 1 if claim.evaluation > 0.25 else -1 if claim.evaluation < -0.25 else 0
                if not claim.words and not polarity:
                    continue
                if _CONCEDES.search(clause) or _CONCEDES.search(sentence[: max(0, sentence.find(clause))][-12:]):
                    conceded.add(len(found))
                if is_fatal(clause):
                    fatal.add(len(found))
                found.append(Argument(clause.strip(" ,.;:"), side, polarity))
    return found or bare, winner, conceded, fatal


def is_fatal(clause: str) -> bool:
    """Whether a clause names a fatal error: one that it does not deny in the words before it."""
    m = _FATAL.search(clause)
    return bool(m) and not re.search(r"(?:\b(?:no|not|without|non)\b|n't\b)(?:\W+\w+){0,3}\W*$", clause[: m.start()])


def _side(clause, inherited):
    mentions = [(m[0], bool(_EXCLUDED.search(clause[: m.start()]))) for m in _SUBJECT.finditer(clause)]
    if mentions and mentions[0][0] == "BOTHSIDES":
        return "both"
    plain = [name[-1] for name, excluded in mentions if not excluded and name != "BOTHSIDES"]
    mentions = [m for m in mentions if m[0] != "BOTHSIDES"]
    if plain:
        return plain[0]
    if mentions:  # only "than SIDEB": the other one is meant
        return OTHER[mentions[0][0][-1]] if re.search(r"\b(?:than|unlike|compared|over|versus|vs|contrast|opposed)\b", clause) else mentions[0][0][-1]
    return inherited


# ---- LLM backend ------------------------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object",
    "properties": {
        "arguments": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "side": {"enum": ["A", "B", "both"]},
                    "polarity": {"enum": ["praise", "blame"]},
                    "core": {"type": "boolean"},
                },
                "required": ["text", "side", "polarity", "core"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["arguments"],
    "additionalProperties": False,
}
_INSTRUCTION = (
    "List the arguments of this critique, which compares Response A and Response B. An argument is one reason. For each give its text, the "
    "response it is about (A, B or both), whether it is praise or blame, and whether it is core: strong enough to justify the choice alone. "
    "If the critique names a fatal error, only that is core. Merge repetitions.\n\n<critique>\n{}\n</critique>"
)


def messages(critique: str) -> list[dict[str, str]]:
    """What the judge is asked for one critique; the critique's own delimiters are neutralised."""
    from .grm import neutralise

    return [{"role": "user", "content": _INSTRUCTION.format(neutralise(critique))}]


def ask(critiques: list[str], judge) -> list[list[Argument] | None]:
    """Arguments by an LLM, one batch; None where the judge gave no usable answer (missing, not empty)."""
    if judge is None:
        raise ValueError("backend 'llm' needs a judge: pass judge=Judge(params.judge)")
    answers = iter(judge.ask([messages(c) for c in critiques if c.strip()], SCHEMA))
    out = []
    for critique in critiques:
        answer = next(answers) if critique.strip() else {"arguments": []}
        out.append(None if answer is None else [
            Argument(text, a["side"], 1 if a["polarity"] == "praise" else -1, a["core"], (text,))
            for a in answer["arguments"] if (text := mask_sides(a["text"]).strip())
        ])  # fmt: skip
    return out


def forget():
    """Empty the caches of extraction (measurements only)."""
    for cached in (analyse, _extract):
        cached.cache_clear()
