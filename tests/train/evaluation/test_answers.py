"""The number and the letter of a completion: the documented tables, and what must not be taken for an answer."""

import time
from fractions import Fraction

import pytest

from hdpo_train.evaluation.answers import after_reasoning, chosen_letter, final_number
from tests.train.docstring_table import rows


@pytest.mark.parametrize(("text", "read"), rows(final_number))
def test_final_number_reads_what_its_docstring_says(text, read):
    assert str(final_number(text)) == read


@pytest.mark.parametrize(("text", "read"), rows(chosen_letter))
def test_chosen_letter_reads_what_its_docstring_says(text, read):
    assert str(chosen_letter(text)) == read


@pytest.mark.parametrize(
    "text",
    [
        "#### 3 to 5", "#### 3–5", "The answer is between 3 and 5.", "#### 50%-60%", "The cost is $3-$5",
        "so it takes 3 to 5", "A: 2024-03-05", "A: March 5, 2024", "A: 3/4/2024", "A: 12:30", "A: 3:5",
        "#### 1'234", "#### 12,5", "#### 1 234", "#### 1,23,456", "#### 12, 13",
        "#### 5 × 3", r"#### 5 \times 3", "so the total is 48 + 24", "The answer is 5 + x", "The answer is 5 ± 1",
        "The answer is 3 hours and 30 minutes.", "A: 5 apples or 6 apples", "A: 5 dollars and 50 cents",
        "#### √2", r"#### \sqrt{2}", r"The answer is 2\pi", "#### 2^10", "#### three",
        r"\boxed{3, 5}", r"\boxed{(3, 4)}", r"\boxed{3\sqrt{2}}", r"\boxed{\sqrt{2}}", r"\boxed{2\pi}", r"\boxed{3x}",
        r"\boxed{3x + 2}", r"\boxed{2^{10}}", r"\boxed{x = 3 \text{ or } x = 5}", r"\boxed{\pm 3}",
        r"\boxed{\frac{x}{2}}", r"\boxed{\text{twelve}}", r"\boxed{A}", r"\boxed{5 + 3}", r"\boxed{x \geq 5}",
        r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"It is 5. \boxed{\text{none}}",
        "<think>9</think>", "9</think>", "#### 9 </thinking>", "<think>So 9.", "<THINK>#### 9", "<reasoning>A: 9",
    ],
)  # fmt: skip
def test_final_number_does_not_guess(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 50%", 50),  # not a half
        ("#### 0.5", Fraction(1, 2)),  # not 50
        (r"\boxed{50\%}", 50),
        ("The area is 12 m2.", 12),
        ("the volume is 12 ft^{3}", 12),
        (r"\boxed{12\text{ miles/hour}}", 12),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{\$12.50}", Fraction(25, 2)),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{\dfrac34}", Fraction(3, 4)),
        (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
        ("A: -1 1/2", Fraction(-3, 2)),
        (r"#### 1{,}234", 1234),
        (r"#### \$1,\!234", 1234),
        ("#### 1\u202f234", 1234),
        ("#### 2.5 x 10^-2", Fraction(1, 40)),
        ("#### (5 + 3) * 2 = 16", 16),
        ("#### 2 * (5 + 3) = 16", 16),
        ("#### 8 = 5 + 3", 8),
        ("The answer is 8 (5 + 3 = 8).", 8),
        ("The answer is 8, since 3 + 5 = 8 and 8 = 4 + 4.", 8),
        ("He has 3. The answer is 8. Check: 8 - 3 = 5.", 8),
        ("<answer>12</answer>", 12),
        ("Put it in \\boxed{}. So 5 + 3 = 8", 8),
        ("#### Step 3: add\n5 + 3 = 8", 8),  # a heading
        ("#### 8 <think> or 9?", 8),
        ("it is 4</think>#### 8", 8),
        ("#### 7\n\nQuestion 2:\n#### 5", 7),
        ("#### 7\n\n**Problem 2:** 5 and 6?\nA: 11", 7),
        ("7\nQ: 2 + 3?\nA: 5", 7),
        ("\\boxed{7}\nUser: and 2 + 3?\n\\boxed{5}", 7),
        ("Question: 3 and 4?\nA: 7", 7),  # a question before the answer is the prompt's, repeated
        ("Answer: Tom has 3.\nHow many has he now?\n3 + 5 = 8\n#### 8", 8),  # asked on the way
        ("#### 5\nHmm, did I count the red ones twice?\n#### 6", 6),
    ],
)
def test_final_number_of_other_notations(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "A, B", "A and C", "A/B", "(A), (C)", "(A) and (C)", "Answer: A, B, and C", "The answer is A or B.",
        "Both A and B", "Either (A) or (B)", "between (A) and (C)", r"\boxed{A, C}", r"\boxed{AC}", r"\boxed{}",
        r"\boxed{\text{Paris}}", r"\boxed{c}", "A is wrong, B is right", "A is not right", "The answer isn't (B).",
        "The answer is not A but B", "Neither (A) nor (B)", "(A) Paris (B) Rome (C) Oslo", "(A) Paris\n(B) Rome",
        "A. Paris\nB. Rome\nC. Oslo", "The choice is yours", "The best option is to wait", "Vitamin C",
        "The answer is A cat", "I am sure", "C</think>", "<thinking>C</thinking>", "<think>The answer is (C)",
    ],
)  # fmt: skip
def test_chosen_letter_does_not_guess(text):
    assert chosen_letter(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B. A cat sat on it", "B"),
        ("B, A cat is small", "B"),
        ("The answer is $B$.", "B"),
        ("Answer: `B`", "B"),
        ("<answer>B</answer>", "B"),
        ("The correct option is: (D) 5", "D"),
        ("Answer: E. coli", "E"),
        (r"\boxed{C. Paris}", "C"),
        ("A) x\nB) y\nI think (B) is right.", "B"),
        ("(A) x\n(B) y\n(C) z\nThe answer: (B)", "B"),
        ("I compare (A) with (C), and take (C)", "C"),
        ("#### B\n\nQuestion: x\n#### C", "B"),
        ("B. Paris\n\nQ: and?\nAnswer: C", "B"),
        ("Question: x\nA) y\nB) z\nAnswer: B", "B"),
    ],
)
def test_chosen_letter_of_other_notations(text, letter):
    assert chosen_letter(text) == letter


def test_after_reasoning():
    assert after_reasoning("a<think>b</think>c</think>d<think>e") == "d"
    assert after_reasoning("think</ think>x < think") == "think</ think>x < think"


@pytest.mark.parametrize(
    "piece", ["#### ", r"\boxed{", "1,", "1/", "(A) ", "<think>", "?", "\n", "A\n", "Q:\n#### 1", r"\frac{", "$", "- 1"]
)
def test_answers_are_read_in_time_in_proportion_to_the_text(piece):
    text = piece * (30_000 // len(piece)) + "x"
    start = time.process_time()
    final_number(text), chosen_letter(text), final_number(f"#### 1 {text}")
    assert time.process_time() - start < 3
