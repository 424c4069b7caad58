"""Prompts files of every form, and which lines a part of a job is told."""

from __future__ import annotations

import pytest

from orchestrator.prompts.choose import NEUTRAL
from quant_spec.errors import InvalidInputError
from quant_spec.prompts import PromptFile, PromptLine, PromptPart, bundle, line_of, read_prompts, select_part


def test_plain_text_has_a_prompt_a_line() -> None:
    lines = read_prompts(b"# emoji\nred heart\n\n  red apple \n")
    assert lines == (PromptLine(prompt="red heart"), PromptLine(prompt="red apple"))


def test_numbers_alone_are_class_labels() -> None:
    assert read_prompts(b"3\n0\n") == (PromptLine(class_label=3), PromptLine(class_label=0))
    assert read_prompts(b"3\nthree cats\n")[0] == PromptLine(prompt="3")
    assert read_prompts(b"3\n")[0].text == "class 3"


def test_tsv_names_its_columns_first() -> None:
    lines = read_prompts(b"seed\tprompt\tnegative_prompt\n7\tred heart\tblurred\n\tred apple\t\n")
    assert lines == (PromptLine("red heart", "blurred", seed=7), PromptLine("red apple"))


def test_prompts_may_have_commas_brackets_and_ends_of_lines_that_files_do_not_have() -> None:
    data = "owl, at night\r\n[a sign]\rred\u2028heart\x0b\n".encode()
    assert [line.prompt for line in read_prompts(data)] == ["owl, at night", "[a sign]", "red\u2028heart"]
    assert read_prompts('{"prompt": "red\u2028heart"}\n'.encode())[0].prompt == "red\u2028heart"


def test_json_lines_are_objects() -> None:
    lines = read_prompts(b'{"prompt": "red heart", "seed": 3}\n{"prompt": "\\u2764"}\n')
    assert lines == (PromptLine("red heart", seed=3), PromptLine("❤"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "p: got no prompts, wanted one a line"),
        (b"\xff\xfe\x00", "p: got bytes that are not UTF-8"),
        (b'{"prompt": "a"}\n{"promt": "b"}\n', "p:2: got promt, wanted a prompt or a class_label"),
        (b'{"prompt": "a"}\nb\n', "p:2: got what is no JSON"),
        (b'{"prompt": 1}\n', "p:1: got prompt '1', wanted text"),
        (b'{"prompt": "a", "seed": -1}\n', "p:1: got seed '-1', wanted a number from 0"),
        (b'{"seed": 1}\n', "p:1: got seed, wanted a prompt or a class_label"),
        (b'{"prompt": "a"}\n{"class_label": 1}\n', "p: got prompts and class labels"),
        (b"prompt\tseed\na\n", "p:2: got 1 columns, wanted 2"),
        (b"prompt\timage\na\tx.png\nb\t\n", "p: got image in some lines, wanted them in all or none"),
        (b"prompt\timage\na\t/x.png\n", "p:2: got image '/x.png', wanted a file in the folder of the prompts file"),
        (b"prompt\timage\na\t../x.png\n", "p:2: got image '../x.png', wanted a file in the folder"),
        (b'{"prompt": "a", "strength": 0.5}\n', "p:1: got strength 0.5, wanted text or the name of a file"),
        (b"prompt,seed\nowl,3\n", "p: got columns with commas between them (prompt,seed), wanted tabs"),
        (b'"prompt", "size"\nowl,3\n', "p: got columns with commas between them"),
        (b'[{"prompt": "owl"},\n {"prompt": "red heart"}]\n', "p: got a JSON array, wanted JSON lines"),
        (b"prompt\tprompt\nowl\tcat\n", "p: got column prompt more than once"),
        (b'{"prompt": "owl", "prompt": "cat"}\n', "p:1: got a key more than once (prompt, prompt), wanted once"),
        (b"red\0heart\n", "p:1: got prompt with the character '\\x00', wanted text"),
        (b'{"prompt": "\\ud83d"}\n', "p:1: got prompt with the character '\\ud83d', wanted text"),
        (b"prompt\tseed\na\t" + b"9" * 6000 + b"\n", "p:2: got seed '999"),
        (b"9" * 6000 + b"\n", "p:1: got class_label '999"),
        (b"PK\x03\x04", "p: got an archive that is no bundle"),
        (bundle(b"prompt\timage\na\tx.png\n", {"y.png": b""}), "p: got x.png named but not in the bundle"),
    ],
)
def test_a_line_that_is_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_prompts(data, "p")
    assert str(caught.value).startswith(message)


def test_what_calibrates_is_not_measured_on() -> None:
    lines = read_prompts(b"a\nb\nc\nd\ne\n")
    fitted, held_out = (select_part(lines, part) for part in PromptPart)
    assert [line.prompt for line in fitted] == ["a", "c", "e"]
    assert [line.prompt for line in held_out] == ["b", "d"]
    assert line_of(held_out, 3).prompt == "d"


def test_one_line_and_class_labels_are_told_to_both_parts() -> None:
    for data in (b"a\n", b"0\n1\n2\n"):
        lines = read_prompts(data)
        assert select_part(lines, PromptPart.CALIBRATION) == select_part(lines, PromptPart.EVALUATION) == lines


def test_the_shipped_prompts_are_256_different_ones() -> None:
    lines = read_prompts(NEUTRAL.read_bytes())
    assert len({line.prompt for line in lines}) == len(lines) == 256


def test_further_columns_are_text_or_files_of_a_bundle() -> None:
    text = b"prompt\tprompt_2\timage\tmask_image\nowl\tat night\ta.png\tb.npy\n"
    files = {"a.png": b"one", "b.npy": b"two"}
    (line,) = read_prompts(text)
    assert line.more == (("image", PromptFile("a.png")), ("mask_image", PromptFile("b.npy")), ("prompt_2", "at night"))
    packed = bundle(text, files)
    assert packed == bundle(text, dict(reversed(files.items())))
    (line,) = read_prompts(packed)
    assert [(file.data, file.is_image) for file in line.files] == [(b"one", True), (b"two", False)]


def test_a_line_may_name_files_alone_which_are_split_as_prompts_are() -> None:
    lines = read_prompts(b"image_embeds\tnegative_image_embeds\na.npy\tb.npy\nc.npy\td.npy\n")
    assert lines[0].text == "a.npy, b.npy"
    assert select_part(lines, PromptPart.EVALUATION) == lines[1:]
