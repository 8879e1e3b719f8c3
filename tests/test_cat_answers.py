"""The text half of cat.py: boxes, answer keys, rubrics, verdicts, numbers.  Needs no model and no network."""
import doctest
import random
import time
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings, strategies as st

import cat
from cat import boxed_answer, normal_answer, read_rubric, read_verdict
from toy.selection import read_number


def same_answer(a, b):
    """As answer_rewards and evaluate.measures compare: no answer is the same as none."""
    return normal_answer(a or "") == normal_answer(b or "") != ""


BACKSLASH = "\\"
LATEX = st.lists(st.sampled_from(
    list("\\{}()[]^_=,.$%°/+-~ !;:&0123579axk\n\u00a0\ud800é") + ["000", ",000", "{,}000", "\\frac", "\\dfrac", "\\tfrac", "\\sqrt", "\\text{", "\\text",
    "\\mbox{", " cm}",
     "\\left", "\\right", "\\!", "\\,", "\\ ", "\\\\", "\\{", "\\}", "^\\circ", "^{\\circ}", "\\degree", "\\pi", "\\boxed{", "x=", "1/2", ", ", "{1}",
        "{2}", "\\$", "\\%", "\\text{th}", "\\in", "matrix}", "\\displaystyle", "/2", "\\sqrt{2}/3"]),
    max_size=14).map("".join)
BALANCED = st.recursive(st.text("ab1 ^_,.$", max_size=5) | st.sampled_from(["\\frac", "\\{", "\\}", "\\\\", "\\pi"]),
                        lambda inner: st.lists(inner, max_size=4).map("".join) | inner.map(lambda s: "{" + s + "}")
        | inner.map(lambda s: "\\boxed{" + s + "}"), max_leaves=12)


def seconds(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def test_docstring_examples():
    result = doctest.testmod(cat)
    assert result.attempted >= 3 and result.failed == 0


# ---------------------------------------------------------------- boxes

@pytest.mark.parametrize("text, content", [
    (r"\boxed{5}", "5"), (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} \boxed{2}", "2"), (r"\boxed {7}", "7"), ("\\boxed \n {7}", "7"),
    (r"\boxed{}", ""),
    (r"\boxed{3} then \boxed{\frac{1}{2", "3"), (r"\boxed{5", None), ("", None), ("no box", None), (r"\boxed 5", None), (r"\fbox{5}", None),
    (r"\boxedx{5}", None),
    (r"boxed{5}", None), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\{1}", r"\{1"), (r"\boxed{1\}}", r"1\}"), (r"\boxed{1\}", None), (r"{ \boxed{5}", "5"),
    (r"} \boxed{5} }", "5"), (r"\boxed{a \boxed{5} b}", r"a \boxed{5} b"), (r"\boxed{a \boxed{5}", "5"), (r"\boxed{1}\boxed{\boxed{2}} x", r"\boxed{2}"),
    (r"\\boxed{5}", "5"), (r"1\\\boxed{5}", "5"), (r"\boxed{1\\{2}}", r"1\\{2}"), (r"\boxed{{5}", None), ("\\boxed{5}\\", "5"),
    (r"\boxed{\text{Bob}} \fbox{6}", r"\text{Bob}"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("\ud800\\boxed{\ud800}", "\ud800")])
def test_boxed_answer(text, content):
    assert boxed_answer(text) == content


@settings(deadline=None)
@given(BALANCED, st.text("ab }.\n", max_size=8), st.text("ab }.\n", max_size=8))
def test_box_content_comes_back(content, before, after):
    assert boxed_answer(f"{before}\\boxed{{{content}}}{after}") == content


@settings(deadline=None)
@given(LATEX | st.text())
def test_box_never_raises_and_is_in_the_text(text):
    content = boxed_answer(text)
    assert content is None or "{" + content + "}" in text


# ---------------------------------------------------------------- answer keys

EQUAL = [
    (r"\frac{\sqrt{x^{2}}}2", r"\frac{\sqrt{x^{2}}}{2}"), (r"\sqrt\frac12", r"\sqrt\frac{1}{2}"), (r"\sqrt\pi", r"\sqrt{\pi}"),
    ("1/2", r"\frac12"), ("1/2", r"\frac{1}{2}"), ("-1/2", r"-\frac12"), (r"\dfrac{1}{2}", r"\tfrac12"), (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{1}2", r"\frac{1}{2}"),
    (r"\frac 1 2", "1/2"), (r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"), (r"\frac\pi2", r"\frac{\pi}{2}"), (r"\frac{1+\frac{1}2}3", r"\frac{1+\frac{1}{2}}{3}"),
    (r"\frac ab", r"\frac{a}{b}"), (r"2\sqrt3", r"2\sqrt{3}"), (r"2 \sqrt 3", r"2\sqrt{3}"), (r"10\%", "10"), ("10%", "10"), (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("90°", "90"), (r"90\degree", "90"), (r"\$5", "5"), ("$5$", "5"), (".5", "0.5"), ("-.5", "-0.5"), ("(.5,1)", "(0.5, 1)"), ("(-.5, 1)", "(-0.5,1)"),
    (r"5\text{ cm}", "5"),
    (r"5 \mbox{ inches}", "5"), (r"5\text{ cm}^2", "5"), (r"5\text{ cm}^{2}", "5"), (r"\frac12\text{ mile}", "1/2"), ("x=5", "5"), ("k = 5", "5"),
    ("AB=5", "5"), ("x=5", "y=5"),
    ("5.", "5"), ("5,", "5"), (" 5 ", "5"), ("5\n", "5"), ("1,000", "1000"), ("\u22125", "-5"), ("10{,}000", "10000"), (r"10,\!000", "10000"), (r"10\,000", "10000"),
    ("1,234,567", "1234567"),
    ("-1,000.5", "-1000.5"), (r"\$1,000\text{ dollars}", "1000"), ("x=1,000.", "1000"), ("(10{,}000,1)", "(10000,1)"), ("1,000, 2,000", "1000, 2000"),
    (r"\text{Bob}", "Bob"), (r"\textbf{Bob}", r"\text{Bob}"), (r"\mathrm{Bob}", "Bob"), (r"\text{ Bob }", "Bob"), (r"\boxed{\frac12}", "1/2"),
    (r"\text{\textbf{yes}}", "yes"),
    (r"\left(1,2\right)", "(1,2)"), (r"\left[0,\infty\right)", r"[0,\infty)"), (r"(1,\ 2)", "(1,2)"), (r"x\;+\;1", "x+1"), (r"x\!+\:1", "x+1"),
    ("x + 1", "x+1"),
    ("[1/2, 3/4]", r"[\frac12,\frac34]"), (r"\{1/2,3\}", r"\left\{\frac{1}{2}, 3\right\}"), ("2^{1/2}", r"2^{\frac12}"), ("x = 1/2", r"\frac{1}{2}"),
    (r"2\frac12", r"2 \frac{1}{2}"),
    (r"1 1/2", r"1 \frac12"), (r"5~\text{cm}", "5"), ("5\\ ", "5"),
    (r"\begin{pmatrix} 3 & 1/2 \\ 1/2 & 7 \end{pmatrix}", r"\begin{pmatrix}3&\frac12\\\frac12&7\end{pmatrix}"), ("1\u00a0+ 2", "1+2"),
    (r"\frac{.5}{2}", r"\frac{0.5}{2}"),
    ("x^{2}", "x^2"), (r"x^2 + \sqrt2", r"x^{2}+\sqrt{2}"), ("2^x", "2^{x}"), (r"e^\pi", r"e^{\pi}"), ("413_5", "413_{5}"), (r"90^ \circ", "90"),
    (r"10^2\text{ cm}", r"10^{2}\mbox{ cm}^2"), (r"\sqrt3\text{ cm}", r"\sqrt{3}"),
    (r"\text{(C)}", "(C)"), ("(C)", "C"), (r"\textbf{(113) }", "113"), (r"\left(C\right).", "C"), ("(-5)", "-5"), ("(0.5)", ".5"), ("x=(5)", "5"),
    ("025", "25"), ("-025", "-25"), ("025.50", "25.50"), ("00", "0"), ("000.5", "0.5"), (r"\boxed{025}", "25"), ("025%", "25"), ("(007)", "7"),
    # as in the reference answers of MATH, and what models write
    (r"\begin{pmatrix} 16/49 \\ -48/49 \end{pmatrix}", r"\begin{pmatrix}\frac{16}{49}\\-\frac{48}{49}\end{pmatrix}"), (r"x \in [-2,7]", "[-2,7]"),
    (r"x \in (-2,7]", "(-2, 7]"), (r"11,\! 111,\! 111,\! 100", "11111111100"), (r"12^{\text{th}} \text{ grade}", "12"), (r"12^\text{th}", "12"),
    (r"3^{\mathrm{rd}}", "3"), (r"(3, \pi/2)", r"(3,\frac\pi2)"), (r"3\sqrt{3}/4", r"\frac{3\sqrt3}{4}"), (r"2\pi/3", r"\frac{2\pi}{3}"),
    (r"99\pi \text{ square inches}", r"99\pi"), (r"\displaystyle\frac12", "1/2"), (r"5\text{ meters}", "5")]
UNEQUAL = [
    ("5,1,000", "5,1000"), ("1234,567", "1234567"), ("x1/2", r"x\frac12"), ("3.1/2", r"3.\frac12"), ("1{,}00", "100"), ("1{,}0000", "10000"),
    ("1/2", "12"), ("1/2", "2/1"), ("1/2", "-1/2"), ("0.5", "1/2"), (r"\text{Bob}", r"\text{Evelyn}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
    ("(1,2)", "1,2"), ("1,2", "12"),
    ("(1,000)", "(1000)"), ("1, 000", "1000"), ("1,00", "100"), ("1,0000", "10000"), ("0,123", "123"), ("1,234,5", "12345"), (r"\{1,000\}", r"\{1000\}"),
    ("[1,234]", "[1234]"),
    ("1 1/2", "11/2"), ("1 2", "12"), (r"\frac{1}{2}", r"\frac{2}{1}"), (r"\frac{1}{23}", r"\frac{1}23"), (r"\sqrt23", r"\sqrt{23}"), ("2", "-2"),
    ("2", "2.0"), ("-0", "0"),
    ("x=5,y=2", "5,y=2"), ("x=1=y", "1=y"), ("abc=5", "5"), (r"x\le5", "5"), (r"2\cdot3", "23"), (r"\frac12x", "1/2x"), (r"x\text{ and }y", "xy"),
    ("5a", "5"),
    (r"3\text{ or }5", "35"), (r"\text{east}", r"\text{west}"), ("A", "B"), ("Bob", "bob"), (r"2\mathrm{i}", "2"), ("1,2,...", "1,2"), ("5.5", "55"),
    (".5", "5"), ("x.5", "x0.5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}"), (r"\begin{pmatrix}1\\,2\end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}"),
    (r"1\\!2", "12"),
    (r"\leftarrow", "arrow"), ("2^3", "23"), ("x_1", "x1"),
    ("x^{23}", "x^23"), ("x^{2}", "x_{2}"), ("x^2", "x2"), ("(1,2)", "1,2"), ("(C, D)", "C, D"), ("(C)(D)", "C)(D"), ("(C)", "D"), ("[C]", "C"),
    (r"\{1\}", "1"), ("f(2)", "f2"), ("(x+1)^2", "x+1^2"), ("0.5", ".05"), ("0.5", "5"), ("0", ""), ("1.05", "1.5"), ("205", "25"), ("250", "25"),
    ("1,025", "1,25"), ("(0, 05)", "0, 5"), ("x05", "x5"), ("05, 06", "5, 06"), ("05x", "5x"), (r"\sqrt{x}\text{ or }", r"\sqrt{x}"),
    (r"9\text{ a.m.}", r"9\text{ p.m.}"), (r"9\text{ AM}", r"9\text{ PM}"), (r"5\text{ hours 30 minutes}", "5"), (r"3+2\text{i}", "3+2"), (r"3\text{ million}", "3"),
    ("2^{th}", "2"), (r"x\in A", "A"), (r"x=\pi/2x", r"\frac{\pi}{2}x"), (r"\pi/23", r"\frac\pi2 3")]


@pytest.mark.parametrize("a, b", EQUAL)
def test_same(a, b):
    assert normal_answer(a) == normal_answer(b) and same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_not_same(a, b):
    assert normal_answer(a) != normal_answer(b) and not same_answer(a, b) and not same_answer(b, a)


@pytest.mark.parametrize("answer", [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"2\cdot3", "-0", "0.50", r"x\inA", r"3\sqrt[3]{2}", r"[0, \infty)",
    "1, 2, ...", r"\leftarrow", "x^{2}+1",
                                    "x=1=y", r"\{1, 2\}", "(1, 2)", "[1, 2)", "(x+1)(x-1)", "0", "0.5", "0.05", "-0.5", "10", "(1, 025)", "x^{10}", r"\textcolor{red}{5}", r"\frac{a}{b}", "Bob", r"\text{a}+\text{b}", "x=", "="])
def test_untouched(answer):
    assert normal_answer(answer) == answer


@pytest.mark.parametrize("empty", [None, "", "  ", "$", r"\text{}", ".", "$$", r"\boxed{}"])
def test_no_answer_is_the_same_as_nothing(empty):
    assert not same_answer(empty, empty) and not same_answer(empty, "5") and not same_answer("5", empty) and not same_answer(empty, None)


@settings(max_examples=1500, deadline=None)
@given(LATEX | st.text())
def test_a_key_is_its_own_key(answer):
    key = normal_answer(answer)
    assert normal_answer(key) == key and same_answer(answer, answer) == (key != "") and same_answer(answer, key) == (key != "")


@pytest.mark.parametrize("answer", [r"\text{" * 5 + "5" + "}" * 5, "5" + r"\text{a}^2" * 40, "\\" * 41, "," * 50, "." * 50,
    "~" * 9 + "1,000" * 9, r"\frac" * 40 + "1" * 40, r"\frac1" * 40, "1/2" * 3334,
                                    ".5 " * 5000, ".5," * 3333, " 1" * 5001, "1/2," * 2499 + "1/2",
        "x=" * 9, r"\frac{\frac{\frac{1}2}3}4", r"\frac{\frac{\frac{\frac{1}2}3}4}5"])
def test_keys_at_the_bounds_are_their_own_keys(answer):
    assert normal_answer(normal_answer(answer)) == normal_answer(answer)


def test_how_far_the_rules_go():
    units = ["5" + r"\text{a}^2" * n for n in (15, 40)]                                      # a unit a round
    assert [normal_answer(u) for u in units] == ["5", units[1]]
    assert [len(normal_answer("x=" + "5" * n)) for n in (9_998, 9_999)] == [9_998, 10_001]


def test_a_long_answer_only_loses_spaces():
    assert normal_answer("1/2" + "  a" * 5000) == "1/2" + " a" * 5000 and normal_answer("1/2" + " +a" * 3000) == r"\frac{1}{2}" + "+a" * 3000


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([x for pair in EQUAL + UNEQUAL for x in pair] + [None, ""]), min_size=3, max_size=3))
def test_same_is_symmetric_and_transitive(answers):
    a, b, c = answers
    assert same_answer(a, b) == same_answer(b, a)
    assert not (same_answer(a, b) and same_answer(b, c)) or same_answer(a, c)


# ---------------------------------------------------------------- rubrics

def rubric(*criteria):
    return "<rubric>" + "".join(f"<criterion>{c}</criterion>" for c in criteria) + "</rubric>"


@pytest.mark.parametrize("text, criteria", [
    (rubric("a", "b"), ["a", "b"]), ("Sure!\n```xml\n" + rubric("a") + "\n```\nHope it helps <3", ["a"]), (rubric("age < 5 & sick"), ["age < 5 & sick"]),
    (rubric("a<b & c>d"), ["a<b & c>d"]),
    (rubric("a<b and c>d"), ["a<b and c>d"]), (rubric("x</y"), ["x</y"]), (rubric("R&D; AT&T"), ["R&D; AT&T"]),
    (rubric("&lt;b&gt; &amp;amp; &#65; &quot;&apos;"), ["<b> &amp; A \"'"]),
    ("<rubric><criterion>a<criterion>b</criterion></rubric>", ["a", "b"]), ("<rubric><criterion>a</rubric>", ["a"]),
    ("<rubric><criterion>a</criterion>", ["a"]), ("<rubric><criterion>a", []),
    ("<rubric><criterion>a</criterion><criterion>b is cu", ["a"]), ("<rubric><criterion>a</criterion><criterion>b</crit", ["a"]),
    (rubric("", "  ", "a", "a", " a\n"), ["a"]), (rubric("a \n\t b"), ["a b"]),
    ("<rubric n='1'><criterion id=\"1\">a</criterion><criterion id=2 >b</criterion></rubric>", ["a", "b"]),
    ("<rubric><criterion id=\">a</criterion><criterion>b</criterion></rubric>", ["a", "b"]),
    (rubric("is <b>very</b> short"), ["is <b>very</b> short"]),
    ("<RUBRIC><Criterion>a</CRITERION></Rubric>", ["a"]), (rubric("<![CDATA[a"), ["<![CDATA[a"]), (rubric("x[y[1]]>2"), ["x[y[1]]>2"]),
    (rubric("a <!-- b"), ["a <!-- b"]),
    ("<rubric><criterion>a<criterion>b</criterion>c</criterion></rubric>", ["a", "b"]),
    ("<rubric>loose<criterion/></rubric>", []), ("<criterion>a</criterion>", ["a"]), ("<criteria>a</criteria>", []),
    ("<rubric></rubric><criterion>a</criterion>", ["a"]), ("", []), (None, []),
    (rubric("a") + rubric("b"), ["b"]), (rubric("a") + rubric(), ["a"]), (rubric("a") + " I closed the <rubric> and each <criterion>.", ["a"]),
    ("I write <rubric> and <criterion>: " + rubric("a"), ["a"]),
    (rubric("a") + rubric(" "), ["a"]), ("<think>" + rubric("draft") + "</think>" + rubric("a"), ["a"]), ("<think>" + rubric("draft") + "</think>", []),
    ("<think>" + rubric("draft"), []),
    (rubric("&#0;&#xd800;a"), ["\ufffd\ufffda"]), (rubric("x" * 1000, "x" * 1001), ["x" * 1000]),
    ('<!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + rubric("&b;"), ["&b;"]), ('<?xml version="1.0"?>' + rubric("a"), ["a"]),
    (rubric("é 漢 👩‍👩‍👧"), ["é 漢 👩‍👩‍👧"])])
def test_read_rubric(text, criteria):
    assert read_rubric(text) == criteria


def test_rubric_is_bounded():
    many = rubric(*map(str, range(5000)))
    assert read_rubric(many) == [str(i) for i in range(50)] and len(read_rubric(many, 3)) == 3 and read_rubric(many, 0) == []
    assert read_rubric(rubric("a") + "x" * 100_000 + rubric("b")) == ["a"] and read_rubric("<think>" + "x" * 200_000 + "</think>" + rubric("b")) == ["b"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("<>&;\"'"), max_size=30), max_size=60), st.text("ab `\n&",
    max_size=9))
def test_escaped_criteria_come_back(criteria, around):
    want = list(dict.fromkeys(c for c in (" ".join(c.split()) for c in criteria) if c))
    assert read_rubric(around + rubric(*map(escape, criteria)) + around) == want[:50]
    assert read_rubric(rubric(*map(escape, criteria)), limit=3) == want[:3]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9), st.text(st.sampled_from("<>/&;![]-\"' =\x00") | st.characters(codec="utf-8"), max_size=4)
    | st.sampled_from(
    ["<rubric>", "</rubric>", "<criterion>", "</criterion>", "<![CDATA[", "]]>", "<!--", "-->", "<!DOCTYPE", "<?", "<script>", "&#", "<think>",
    "</think>"])), max_size=8), st.integers(0, 5))
def test_mutated_rubrics_never_raise(edits, limit):
    text = rubric("age &lt; 5", "is <b>short</b>", "<![CDATA[x < y]]>", "a" * 40, "b") + rubric("c", "d", "e")
    for at, cut, put in edits:
        text = text[:at] + put + text[at + cut:]
    criteria = read_rubric(text, limit)
    assert len(criteria) <= limit and len(set(criteria)) == len(criteria)
    assert all(c and c == " ".join(c.split()) and len(c) <= 1000 for c in criteria)
    "".join(criteria).encode("utf-8")                                                        # can be written: &#xd800; is no lone surrogate (decode and Endpoint give none)


@settings(deadline=None)
@given(st.text())
def test_rubric_of_any_text(text):
    assert read_rubric(text) == []
    read_rubric("<rubric><criterion>" + text)


# ---------------------------------------------------------------- verdicts and numbers

@pytest.mark.parametrize("text, verdict", [
    ("yes", True), ("no", False), ("Yes", True), ("NO", False), ("**Yes.**", True), ('"no"', False), ("Yes!", True), ("\n yes \n", True),
    ("`no`", False), ("_yes_", True), ("“Yes.”", True), ("(no)", False),
    ("# Yes", True), ("<think>no</think>yes", True), (" <think>\nyes\n</think>\n\n**No**", False),
    (None, None), ("", None), ("yes and no", None), ("not yes", None), ("yes, because", None), ("Yes no", None), ("no\nyes", None),
    ("yes</criterion>", None), ("Verdict: yes", None), ("<think>yes", None),
    ("<think>a</think><think>b</think>yes", None), ("yes<think>no</think>", None), ("a</think>yes", True), ("yes</think>", None), ("nope", None), ("yess", None),
    ("y es", None), ("ye\u017f", None), ("!yes", None), ("-yes", None),
    ("~~yes~~", None), ("yes?", None), ("[ ] yes", None), ("❌ yes", None), ("yes/no", None), ("yes.no", None), ("no no", None), ("true", None),
    ("1", None), ("нo", None), ("yes\u200b", None), ("{yes}", None),
    ("<yes>", None), ("<think></think>", None), ("ok", None), ("**", None), ("yes\x00", None)])
def test_read_verdict(text, verdict):
    assert read_verdict(text) is verdict


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("yesnoYESNO *.\"!\n<>/-ſ") | st.characters(), max_size=9) | st.lists(st.sampled_from(["yes", "no", "not", "**", ".", " ",
    "\n", "<think>", "</think>", "?"]), max_size=6).map("".join))
def test_a_verdict_is_one_word(text):
    said = text.partition("</think>")[2] if "</think>" in text or text.lstrip().startswith("<think>") else text
    letters = "".join(c for c in said if c.isalpha()).casefold()
    assert read_verdict(text) in {"yes": (True, None), "no": (False, None)}.get(letters, (None,))


@pytest.mark.parametrize("text, number", [
    ("3", 3), ("**3**", 3), ("3.", 3), ("Answer 3", 3), ("Response 3", 3), ("#3", 3), ("answer: 3", 3), ("**Response #3**", 3), ("Candidate 8.", 8),
    ("1", 1), ("8", 8), ("(3)", 3), ("<think>1 or 2?</think>\n3", 3),
    ("0", None), ("9", None), ("-3", None), ("3.5", None), ("3 4", None), ("3/4", None), ("3 of 8", None), ("not 3", None), ("Answer", None), ("", None),
    (None, None), ("three", None), ("٣", None), ("３", None),
    ("3" + " " * 60, 3), ("Answer" + " " * 40 + "3", 3), ("9" * 5000, None), ("3 is best", None), ("Answer 3 beats 4", None), ("<think>3", None),
    ("1e1", None), ("3rd", None), ("A3", None), ("3\n4", None), ("+3", None)])
def test_read_number(text, number):
    assert read_number(text, 8) == number


@settings(deadline=None)
@given(st.text(st.sampled_from("0123456789 *.#-Answer٣") | st.characters(), max_size=45), st.integers(-1, 12))
def test_a_number_is_the_only_one(text, n):
    number = read_number(text, n)
    assert number is None or 1 <= number <= n and int("".join(c for c in text if c.isnumeric())) == number


# ---------------------------------------------------------------- time

M = 200_000  # what is quadratic takes minutes


@pytest.mark.parametrize("text", [r"\boxed{" * (M // 7), r"\boxed{" * (M // 8) + "}" * (M // 8), BACKSLASH * M, "{" * M,
    "}" * M, r"\boxed" * (M // 6), r"\boxed" + " " * M, r"\boxed{}" * (M // 8), r"\boxed{" + "{" * M])
def test_boxes_in_linear_time(text):
    assert seconds(boxed_answer, text) < 2


@pytest.mark.parametrize("piece", [r"\frac{", r"\frac{1}", r"\frac{{{", r"\text{", r"5\text{", r"\text{a}", "{", "}", BACKSLASH, "1", "1,", "1,000",
    ",000", "1/", "(1/2", ".", ".5", ", ", " ", "~", "1 ", "=", "x=", "{}", r"\frac{{}{}",
                                   r"\frac{a}{", r"\sqrt", r"{\frac", "$", r"\frac", r"\frac1", "[", r"\boxed{"])
def test_keys_in_bounded_time(piece):
    for size in (10_000, M):
        for end in ("", "!", "}", "x"):
            assert seconds(normal_answer, (piece * size)[:size - 1] + end) < 2


@pytest.mark.parametrize("piece", ["<", "&", "<rubric>", "<criterion>", "<rubric", "<criterion ", "</", "<!--", "<!-", "-", "<![CDATA[", "]", "<a ",
    "<a x=\"", "<a x='' ", "&#", "&lt", "&lt;", "<rubric><criterion>a", "a", " ", "\x00", "<!", "<?",
                                   "<think>", "</think>", "</criterion>a", "<criterion\n"])
def test_rubrics_in_linear_time(piece):
    for start in ("", "<rubric><criterion>", "<a", "<!--", "<![CDATA[", "<rubric "):
        assert seconds(read_rubric, start + (piece * M)[:M]) < 2


def test_verdicts_in_linear_time():
    for piece in ("*", " ", "yes", "yes ", "no.", "<think>", "</think>", "#", "1", "Answer "):
        for text in (piece * M, piece * M + "x", "yes" + piece * M + "x"):
            assert seconds(read_verdict, text) < 2 and seconds(read_number, text, 8) < 2


def test_random_bytes():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("\\{}<>&;/!-[]\"' =.,0159frac") for _ in range(rng.randrange(400)))
        boxed_answer(text), normal_answer(text), read_rubric("<rubric><criterion>" + text + "</rubric>"), read_verdict(text), read_number(text, 8)
