"""The reward `math` on answers of many kinds: what is the same, and what only looks so. Truth is mathematics."""

from __future__ import annotations

import time

import pytest

from megatron_posttrain.rewards import Sample
from megatron_posttrain.rewards.extract import boxed, final_answer
from megatron_posttrain.rewards.math import math_reward

SAME = [
    # numbers
    (r"\boxed{3 1/2}", "7/2"), (r"\boxed{3\frac{1}{2}}", "3.5"), (r"\boxed{-3 1/2}", "-7/2"), (r"\boxed{3½}", "7/2"),
    (r"\boxed{1{,}234}", "1234"), (r"\boxed{1\,234\,567}", "1,234,567"), (r"\boxed{3,14}", "3.14"),
    (r"\boxed{1.234,56}", "1234.56"), (r"\boxed{１２}", "12"), (r"\boxed{٤٢}", "42"), (r"\boxed{−5}", "-5"),
    (r"\boxed{0.\overline{3}}", r"\frac{1}{3}"), (r"\boxed{0.1\overline{6}}", "1/6"), (r"\boxed{007}", "7"),
    (r"\boxed{1.5\times 10^{3}}", "1500"), (r"\boxed{2.5e-3}", "0.0025"), (r"\boxed{10^{6}}", "1000000"),
    (r"\boxed{3 million}", "3000000"), (r"\boxed{.5}", "1/2"), (r"\boxed{\frac12}", "0.5"), (r"\boxed{\frac 1 2}", "0.5"),
    (r"\boxed{\dfrac{-1}{2}}", r"-\frac{1}{2}"), (r"\boxed{0.333333}", r"\frac{1}{3}"), ("9" * 400, "9" * 400),
    (r"\boxed{101_2}", "101_{2}"), (r"\boxed{101}", "101_2"), (r"\boxed{1+2=3}", "3"), (r"\boxed{2^{10}}", "1024"),
    # units, money, percent
    (r"\boxed{10}", "10 km/h"), (r"\boxed{10\text{ km/h}}", "10"), (r"\boxed{10 km/h}", "10 km/h"), (r"\boxed{35cm}", "35"),
    (r"\boxed{12\sqrt{3}\text{ cm}^2}", r"12\sqrt{3}"), (r"\boxed{5\text{ hours}}", "5 hrs"), (r"\boxed{\$5}", "5 dollars"),
    (r"\boxed{\$1,250.00}", "1250"), (r"\boxed{25\%}", "25"), (r"\boxed{25}", r"25\%"), (r"\boxed{0.25}", "25%"),
    (r"\boxed{12.5 percent}", r"12.5\%"), (r"\boxed{90^\circ}", "90"), (r"\boxed{90°}", r"90^{\circ}"), ("9", "9 (apples)"),
    (r"\boxed{18 square meters}", r"18\text{ m}^2") , (r"\boxed{£18}", "18"),
    # lists, tuples, intervals, sets, matrices
    (r"\boxed{2,1}", "1, 2"), (r"\boxed{\{2,1\}}", r"\{1,2\}"), (r"\boxed{(\frac12,3)}", "(0.5, 3)"), (r"\boxed{1 \text{ and } 2}", "1,2"),
    (r"\boxed{x=1, y=2}", "x=1,y=2"), (r"\boxed{[0,1)}", r"\left[0,1\right)"), (r"\boxed{x \le 3}", r"(-\infty,3]"),
    (r"\boxed{(-\infty,-1)\cup(1,\infty)}", r"(1,\infty)\cup(-\infty,-1)"), (r"\boxed{1,000, 2,000}", "2000, 1000"),
    (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), (r"\boxed{3\pm\sqrt{2}}", r"3-\sqrt{2}, 3+\sqrt{2}"),
    (r"\boxed{\emptyset}", r"\{\}"), (r"\boxed{∅}", r"\varnothing"),
    # expressions
    (r"\boxed{\sqrt{12}}", r"2\sqrt3"), (r"\boxed{2π}", r"2\pi"), (r"\boxed{√2/2}", r"\frac{1}{\sqrt{2}}"), (r"\boxed{x²+2x+1}", "(x+1)^2"),
    (r"\boxed{x**2}", "x^2"), (r"\boxed{y = 2x+1}", "2x+1"), (r"\boxed{f(x)=x^2}", "x^2"), (r"\boxed{3:4}", "3:4"),
    (r"\boxed{p \to q}", r"p \rightarrow q"), (r"\boxed{\text{even}}", "Even"), (r"\boxed{Tuesday}", r"\text{Tuesday}"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2"), (r"\boxed{x_1=3}", "3"), (r"\boxed{\mathbf{42}}", "42"),
    # where the answer is
    (r"a \boxed{1} b \boxed{2}", "2"), (r"\boxed{\boxed{5}}", "5"), (r"\fbox{5}", "5"), ("\\boxed{\n5\n}", "5"), (r"so \boxed{3}, \boxed{4}", "3,4"),
    ("答案是54。", "54"), ("所以答案是：**54**。", "54"), ("答えは54です。", "54"), ("一共有54个苹果。", "54"), ("**\\$250**", "250"),
    ("The answer is **12**.", "12"), ("Final answer: $\\frac{1}{2}$", "0.5"), ("**Answer:**\n\n42", "42"), ("The answer is $x = 5$.", "5"),
    ("Thus he earns $70,000 a year.", "70000"), ("the total is \\(2\\sqrt{2}\\).", "\\sqrt{8}"), ("A: 26", "26"), ("2*3=<<2*3=6>>6\n#### 6", "6"),
    ("It takes 3 hours and costs $12.", "12"), ("Therefore\n\\[ x = \\frac{3}{4} \\]", "0.75"), ("The roots are $x=1$ or $x=2$.", "1,2"),
    ("The answer is (B).", "B"), (r"\boxed{(B)}", "B"), ("B", "(B)"), ("She makes $18 per day.", "$18"), ("He has 3/4 of it left.", "0.75"),
]  # fmt: skip
DIFFERENT = [
    # a part of the answer
    (r"7\sqrt{2}", "7"), (r"\boxed{7\sqrt{2}}", "2"), (r"\boxed{3\pi}", "3"), (r"\boxed{10^{6}}", "10"), (r"\boxed{10^{6}}", "6"), ("12x", "12"),
    (r"\boxed{4<x<9}", "9"), (r"\boxed{x>4}", "4"), ("It is 12x.", "12"), ("So x = 2\\sqrt{2}.", "2"), (r"\boxed{\frac{1}{2}}", "1"), (r"\boxed{\frac{1}{2}}", "2"),
    (r"\boxed{5i}", "5"), (r"\boxed{5!}", "5"), (r"\boxed{-5}", "5"), (r"\boxed{5,6}", "5"), (r"\boxed{5 or 6}", "5"), (r"\boxed{5 \text{ or } 6}", "6"),
    ("It is 41 or 42.", "42"), ("The answer is 41 or 42", "42"), (r"\boxed{41} or \boxed{42}", "42"), (r"\boxed{|5|x}", "5"), (r"\boxed{5t}", "5"), (r"\boxed{5n}", "5"),
    (r"\boxed{\log_2 5}", "5"), (r"\boxed{a_5}", "5"), (r"\boxed{5^\circ 30'}", "5"), (r"\boxed{x+5}", "5"), (r"\boxed{\{5\}}", "6"), (r"\boxed{5\text{ or more}}", "5"),
    (r"\boxed{2 million}", "2"), (r"\boxed{half of 8}", "8"), (r"\boxed{12 thirds}", "12"), (r"\boxed{5 squared}", "5"),
    # look alike
    (r"\boxed{31/2}", "3 1/2"), (r"\boxed{51}", "5 1"), (r"\boxed{5 1}", "6"), (r"\boxed{(3125)}", "(3,125)"), (r"\boxed{(3,125)}", "3125"), (r"\boxed{\{1,234\}}", r"\{1234\}"),
    (r"\boxed{p \leftarrow q}", r"p \rightarrow q"), (r"\boxed{p \Leftarrow q}", r"p \Rightarrow q"), (r"\boxed{101_3}", "101_2"), (r"\boxed{5}", "101_2"), (r"\boxed{10_2}", "10"),
    (r"\boxed{1/2^{98}}", "1/2^{99}"), (r"\boxed{10^{-20}}", "10^{-21}"), (r"\boxed{0.0000001}", "0.0000002"), (r"\boxed{0.00000001}", "0"), (r"\boxed{\frac{1}{2^{40}}}", "0"),
    (r"\boxed{0.33}", r"\frac{1}{3}"), (r"\boxed{3.14}", r"\pi"), (r"\boxed{3.14159}", r"\pi"), (r"\boxed{1e400}", "1e401"), ("9" * 5000, "9" * 4999),
    (r"\boxed{[0,1]}", "(0,1)"), (r"\boxed{(0,1]}", "(0,1)"), (r"\boxed{(2,1)}", "(1,2)"), (r"\boxed{1,2,2}", "1,2"), (r"\boxed{1}", "1,1"), (r"\boxed{x<3}", r"(-\infty,3]"),
    (r"\boxed{5 m}", "5 cm"), (r"\boxed{5\text{ cents}}", "5 dollars"), (r"\boxed{0.25\%}", "25%"), (r"\boxed{0.25\%}", "0.25"), (r"\boxed{2500\%}", "25%"), (r"\boxed{5 cm}", r"5\text{ cm}^2"),
    (r"\boxed{on}", "no"), (r"\boxed{sey}", "yes"), (r"\boxed{not even}", "even"), (r"\boxed{A, B}", "A"), (r"\boxed{B}", "A"), ("The answer is (A) or (B).", "B"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1&2\end{pmatrix}"), (r"\boxed{x=3}", "y=3"), (r"\boxed{3:4}", "4:3"), (r"\boxed{x \ge 3}", r"x \le 3"),
    # no answer
    (r"first 5 \boxed{}", "5"), (r"5 \boxed{ }", "5"), (r"\boxed{42", "42"), (r"so \boxed{42\sqrt", "42"), ("", "5"), (r"\boxed{\text{}}", "5"), ("The answer is not 5.", "5"),
    (r"\boxed{?}", "5"), ("$$", "5"), (r"\boxed{\infty}", r"-\infty"), (r"\boxed{1/0}", "2/0"), (r"\boxed{\text{5 or 6}}", "5"), (r"\boxed{\$}", "5"),
    ("#### 5\n#### 6", "6"), ("I considered 5. The answer is 6.", "5"), (r"\boxed{41}, or maybe 42", "42"), ("A: 5\nB: 6\nThe answer is 7", "6"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), SAME)
def test_same(response: str, answer: str) -> None:
    assert math_reward(Sample([], response, answer)) == 1.0


@pytest.mark.parametrize(("response", "answer"), DIFFERENT)
def test_different(response: str, answer: str) -> None:
    assert math_reward(Sample([], response, answer)) == 0.0
