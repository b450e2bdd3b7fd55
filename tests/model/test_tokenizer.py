"""The tokenizer, on small generated vocabularies and on real ones if they are installed."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpaged_model.metadata import ModelError
from jaxpaged_model.text.pretokenizers import PRE_TOKENIZERS
from jaxpaged_model.text.tokenizer import Tokenizer

AWKWARD_TEXTS = [
    "Hello, world! It's 'quoted' and I'LL DON'T stop.",
    "héllo wörld cafe\u0301 e\u0301\u0302",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😶‍🌫️ 🦙",
    "Привет мир · 你好，世界 · こんにちは · 안녕하세요 · สวัสดี · नमस्ते · កាន់តែ",
    "مرحبا بالعالم ۔ 1٢٣",
    "   leading,  runs     of spaces   ",
    "\t\ttabs\r\nand\n\n\nlines \n  indented\n",
    "def f(x):\n    return {'a': x[0] ** 2}  # 100%\n",
    "1 12 123 1234 12345 3.14159 1,000,000",
    "\x00\x01 control \x7f and \ufeff bom \u200b zero width \xa0 nbsp \u3000",
    "<|im_end|> </s> <0x41> [INST]",
]
texts = st.text(max_size=40) | st.text(
    alphabet=" \n\r\t'aAzZsſß19½é中か가ก\u0301.,!_-/<|>{🦙\xa0", max_size=40
)


def byte_level_metadata(pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary whose merges cross every kind of boundary, so that a wrong split changes tokens.

    Its last tokens: <|endoftext|> and <|im_end|> control, <tool> user-defined, [UNUSED] unused.
    """
    tokens, merges = _trained_byte_level()
    special = ["<|endoftext|>", "<|im_end|>", "<|other|>", "<tool>", "[UNUSED]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 3, 4, 5],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens),
    }
    return with_changes(metadata, changes)


@lru_cache
def _trained_byte_level() -> tuple[list[str], list[str]]:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    library.train_from_iterator(AWKWARD_TEXTS * 2, trainer)
    model = json.loads(library.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


WORDS = {
    "▁": -1.0,
    "a": -2.0,
    "b": -3.0,
    "ab": -4.0,
    "▁ab": -5.0,
    "▁▁": -6.0,
    "ba": -7.0,
    "é": -8.0,
    "s>": -9.0,
}


def spm_metadata(words: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk> <s> </s>, 256 bytes, <|user|> user-defined, then `words`."""
    words = WORDS if words is None else words
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|user|>", *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 260 + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 4, *[1] * len(words)],
    }
    return with_changes(metadata, changes)


def with_changes(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`add_bos_token=True` sets `tokenizer.ggml.add_bos_token`; None removes a key."""
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def token_texts(tokenizer: Tokenizer, text: str, **options: bool) -> list[bytes]:
    return [tokenizer.token_bytes(token) for token in tokenizer.encode(text, **options)]


class TestByteLevel:
    @pytest.mark.parametrize("pre", sorted(name for name, rule in PRE_TOKENIZERS.items() if rule.byte_level))
    def test_decode_inverts_encode(self, pre: str) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre))
        for text in AWKWARD_TEXTS:
            assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text

    @settings(deadline=None, max_examples=60)
    @given(text=texts)
    def test_decode_inverts_encode_of_any_text(self, text: str) -> None:
        for pre in ("llama-bpe", "qwen2", "smollm", "deepseek-llm", "tekken", "kimi-k2", "superbpe"):
            tokenizer = _byte_level(pre)
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_lone_surrogate_is_a_replacement_character(self) -> None:
        tokenizer = _byte_level("gpt-2")
        assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83e\udd99")) == "a\ufffdb🦙"

    @pytest.mark.parametrize(
        ("pre", "text", "pieces"),
        [
            ("gpt-2", "Hello  world's 123\n\nX", "Hello| | world|'s| 123|\n|\n|X"),
            ("gpt-2", "DON'T we'll", "DON|'|T| we|'ll"),
            ("smollm", "in 2024 x12", "in| |2|0|2|4| x|1|2"),
            ("llama-bpe", "DON'T 12345 a\n\n  b", "DON|'T| |123|45| a|\n\n| | b"),
            ("llama-bpe", "(foo)\r\n x", "(foo|)\r\n| x"),
            ("qwen2", "12 ab!?\n", "1|2| ab|!?\n"),
            ("qwen35", "e\u0301a\u0301 नमस्ते", "e\u0301a\u0301| नमस्ते"),
            ("default", "a+b 1234", "a|+|b| |123|4"),
            ("falcon", "x` 1234", "x|`| |123|4"),
            ("starcoder", "v1.25", "v|1|.|2|5"),
            ("deepseek-llm", "Hi 你好 abc\n42", "Hi| |你好| abc|\n|42"),
            ("deepseek-coder", "x == 42\n", "x| == |4|2|\n"),
            ("deepseek-v3", "abc12345 .com 日本", "abc|123|45| .|com| |日本"),
            ("tekken", "camelCase HTTPServer 12", "camel|Case| HTTPServer| |1|2"),
            ("gpt-4o", "camelCase's 1234", "camel|Case's| |123|4"),
            ("kimi-k2", "你好abc你", "你好|abc|你"),
            ("bloom", "one, two. three", "one|,| two|.| three"),
            ("viking", "a 12", "a| |1|2"),
            ("superbpe", "1234567", "1|234|567"),
            ("afmoe", "n 1234567", "n| |1|234|567"),
            ("tiny_aya", "1234567", "1|234|567"),
            ("seed-coder", "x!!\n", "x|!!|\n"),
            ("ufakzeka", "Ankara'da", "Ankara|'da"),
            ("jais-2", "a" + " " * 7 + "b", "a|    |  | b"),
            ("gemma4", "one two\n\nthree", "one two|\n\n|three"),
        ],
    )
    def test_each_family_splits_its_own_way(self, pre: str, text: str, pieces: str) -> None:
        splits = [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
            for pattern in PRE_TOKENIZERS[pre].patterns
        ]
        found = tokenizers.pre_tokenizers.Sequence(splits).pre_tokenize_str(text)
        expected = pieces.split("|")
        assert [piece for piece, _ in found] == expected

    def test_merges_stay_inside_the_pieces_of_a_split(self) -> None:
        metadata = byte_level_metadata()
        digits = {"tokens": ["1", "2", "12", "Ġ", "Ġ1", "<e>"], "merges": ["Ġ 1", "1 2"], "token_type": None}
        metadata = with_changes(metadata, digits | {"bos_token_id": 5, "eos_token_id": 5})
        by_name = {
            name: token_texts(Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name}), "12 12")
            for name in ("gpt-2", "smollm", "llama-bpe")
        }
        assert by_name["gpt-2"] == [b"12", b" 1", b"2"]
        assert by_name["smollm"] == [b"1", b"2", b" ", b"1", b"2"]
        assert by_name["llama-bpe"] == [b"<e>", b"12", b" ", b"12"]

    @pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [b"abc"]), ("gpt-2", [b"a", b"b", b"c"])])
    def test_llama_3_takes_a_word_that_is_a_token_without_merging(self, pre: str, expected: list) -> None:
        metadata = byte_level_metadata(pre, tokens=["a", "b", "c", "abc"], merges=[], token_type=None)
        metadata |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0}
        assert token_texts(Tokenizer.from_gguf(metadata), "abc", add_special=False) == expected

    def test_a_pair_merges_by_rank_not_by_place(self) -> None:
        changes = {"tokens": ["a", "b", "c", "bc", "ab"], "merges": ["b c", "a b"], "token_type": None}
        metadata = byte_level_metadata(bos_token_id=0, eos_token_id=0, **changes)
        assert token_texts(Tokenizer.from_gguf(metadata), "abc") == [b"a", b"bc"]


class TestScores:
    def test_the_best_score_merges_first(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert token_texts(tokenizer, "ab", add_special=False) == [b" ab"]
        assert token_texts(tokenizer, "aba", add_special=False) == [b" ab", b"a"]

    def test_of_equal_scores_the_leftmost_merges_first(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata({"a": -9, "aa": -1}, add_space_prefix=False))
        assert token_texts(tokenizer, "aaa", add_special=False) == [b"aa", b"a"]

    def test_text_without_a_token_becomes_bytes(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert token_texts(tokenizer, "é🦙", add_special=False) == [
            b" ", "é".encode(), *(bytes([byte]) for byte in "🦙".encode())
        ]  # fmt: skip

    def test_without_byte_tokens_the_unknown_token_stands_in(self) -> None:
        kinds = [2, 3, 3, *[5] * 256, 4, *[1] * len(WORDS)]
        tokenizer = Tokenizer.from_gguf(spm_metadata(token_type=kinds))
        assert tokenizer.encode("c", add_special=False)[-1] == 0

    @settings(deadline=None, max_examples=150)
    @given(text=st.text(alphabet="ab é🦙\n\u2582", max_size=30))
    def test_decode_inverts_encode(self, text: str) -> None:
        tokenizer = _spm()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        without = _spm_without_prefix()
        assert without.decode(without.encode(text)) == text

    @settings(deadline=None, max_examples=100)
    @given(text=st.text(alphabet="ab ", max_size=30), joined=st.booleans())
    def test_cutting_at_spaces_changes_nothing(self, text: str, joined: bool) -> None:
        """The encoder merges word by word; the specification is a search over the whole text."""
        words = WORDS | ({"b▁": -4.5, "b▁a": -4.2} if joined else {})
        tokenizer = Tokenizer.from_gguf(spm_metadata(words))
        pieces = list(("▁" + text.replace(" ", "▁")) if text else "")
        while pairs := [
            (-words[left + right], i)
            for i, (left, right) in enumerate(pairwise(pieces))
            if left + right in words
        ]:
            i = min(pairs)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        expected = [piece.replace("▁", " ").encode() for piece in pieces]
        assert token_texts(tokenizer, text, add_special=False) == expected

    def test_text_cannot_spell_a_control_token(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata(WORDS | {"<": -9, "<s": -1, ">": -9}))
        assert 1 not in tokenizer.encode("<s>", add_special=False)
        assert 1 in tokenizer.encode("<s>", add_special=False, parse_special=True)

    def test_a_text_starts_with_a_space_also_after_a_special_token(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert token_texts(tokenizer, "ab<|user|>ab") == [b"<s>", b" ab", b"<|user|>", b" ab"]
        assert tokenizer.encode("") == [1]


class TestSpecialTokens:
    def test_control_tokens_are_read_on_request_only(self) -> None:
        tokenizer = _byte_level("gpt-2")
        control = byte_level_metadata()["tokenizer.ggml.tokens"].index("<|im_end|>")
        assert tokenizer.encode("a<|im_end|>", parse_special=True)[-1] == control
        assert control not in tokenizer.encode("a<|im_end|>")

    def test_user_defined_tokens_are_always_read(self) -> None:
        tokenizer = _byte_level("gpt-2")
        assert b"<tool>" in token_texts(tokenizer, "x<tool>y")
        assert tokenizer.decode(tokenizer.encode("x<tool>y")) == "x<tool>y"

    def test_the_longest_of_two_special_tokens_wins(self) -> None:
        changes = {"tokens": ["a", "<x>", "<x>a"], "merges": [], "token_type": [1, 4, 4]}
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(bos_token_id=0, eos_token_id=0, **changes))
        assert tokenizer.encode("<x>aa<x>") == [2, 0, 1]

    def test_decode_hides_control_tokens_unless_asked(self) -> None:
        tokenizer = _byte_level("gpt-2")
        ids = tokenizer.encode("a<|other|>b", parse_special=True)
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, skip_special=False) == "a<|other|>b"

    def test_tokens_of_phi_3_swallow_the_spaces_behind_them(self) -> None:
        metadata = spm_metadata() | {"general.name": "Phi-3 mini"}
        assert token_texts(Tokenizer.from_gguf(metadata), "<|user|> \n ab<s> ab", parse_special=True) == [
            b"<s>", b"<|user|>", b" ab", b"<s>", b" ", b" ab"
        ]  # fmt: skip

    def test_bos_and_eos_follow_the_file(self) -> None:
        eos = byte_level_metadata()["tokenizer.ggml.eos_token_id"]
        both = Tokenizer.from_gguf(byte_level_metadata(add_bos_token=True, add_eos_token=True))
        assert both.add_bos and both.add_eos
        assert both.encode("") == [eos, eos]
        assert both.encode("", add_special=False) == []

    @pytest.mark.parametrize(("pre", "add_bos"), [("gpt-2", False), ("llama-bpe", True), ("qwen2", False)])
    def test_the_family_decides_on_bos_if_the_file_does_not(self, pre: str, add_bos: bool) -> None:
        assert Tokenizer.from_gguf(byte_level_metadata(pre)).add_bos == add_bos
        assert Tokenizer.from_gguf(byte_level_metadata(pre, add_bos_token=False)).add_bos is False

    def test_sentencepiece_starts_with_bos_unless_the_file_says_no(self) -> None:
        tokenizer = Tokenizer.from_gguf(spm_metadata())
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (
            1,
            2,
            True,
            False,
        )
        assert Tokenizer.from_gguf(spm_metadata(add_bos_token=False)).encode("") == []

    def test_every_end_of_generation_token_stops(self) -> None:
        metadata = byte_level_metadata(eot_token_id=5, eom_token_id=7)
        tokens = metadata["tokenizer.ggml.tokens"]
        named = {tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")}
        assert Tokenizer.from_gguf(metadata).stop_ids == named | {5, 7}

    def test_several_ends_of_text(self) -> None:
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(eos_token_id=[5, 7], add_eos_token=True))
        assert tokenizer.eos_id == 5 and {5, 7} <= tokenizer.stop_ids
        assert tokenizer.encode("") == [5]

    def test_the_end_of_a_channel_does_not_stop(self) -> None:
        texts = ["a", "<|return|>", "<|call|>", "<|end|>", "<|channel|>"]
        changes = {"tokens": texts, "merges": [], "token_type": [1, 3, 3, 3, 3]}
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(bos_token_id=1, eos_token_id=1, **changes))
        assert tokenizer.stop_ids == {1, 2}
        assert tokenizer.decode([4, 0, 3]) == "<|channel|>a<|end|>"

    def test_the_chat_template_comes_along(self) -> None:
        metadata = byte_level_metadata() | {"tokenizer.chat_template": "{{ messages }}"}
        assert Tokenizer.from_gguf(metadata).chat_template == "{{ messages }}"
        assert _byte_level("gpt-2").chat_template is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"pre": "brand-new"}, "unknown pre-tokenizer 'brand-new'"),
            ({"model": "bert"}, r"'bert' \(WordPiece vocabulary\) is not supported; supported are"),
            ({"model": "t5"}, "Unigram"),
            ({"model": "rwkv"}, "RWKV"),
            ({"model": "novel"}, "unknown tokenizer model 'novel'"),
            ({"model": None}, r"tokenizer\.ggml\.model is missing"),
            ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
            ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
            ({"merges": ["ab"]}, "merges: entry 0, 'ab', is not two parts"),
            ({"tokens": ["a", "b", "a"]}, "tokens 0 and 2 are both 'a'"),
            ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries"),
            ({"add_bos_token": True, "bos_token_id": None}, "there is no tokenizer.ggml.bos_token_id"),
        ],
    )
    def test_unknown_values_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            Tokenizer.from_gguf(byte_level_metadata(**changes))
        assert "\n" not in str(caught.value)

    def test_a_file_without_a_pre_tokenizer_is_read_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="'default'"):
            tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=None))
        assert tokenizer.encode("a+b") == _byte_level("default").encode("a+b")

    def test_a_merge_that_leads_to_no_token_is_left_out_with_a_warning(self) -> None:
        changes = {"tokens": ["a", "b", "c", "ab"], "merges": ["b c", "a b"], "token_type": None}
        with pytest.warns(UserWarning, match="1 merges"):
            tokenizer = Tokenizer.from_gguf(byte_level_metadata(bos_token_id=0, eos_token_id=0, **changes))
        assert token_texts(tokenizer, "abc") == [b"ab", b"c"]

    def test_a_special_id_that_is_no_token_is_ignored_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="tokenizer.ggml.eos_token_id is 4294967295"):
            assert Tokenizer.from_gguf(byte_level_metadata(eos_token_id=2**32 - 1)).eos_id is None

    def test_scores_and_tokens_differ_in_number(self) -> None:
        with pytest.raises(ModelError, match="scores"):
            Tokenizer.from_gguf(spm_metadata(scores=[0.0]))

    @pytest.mark.parametrize("token", [-1, 10_000])
    def test_an_id_outside_the_vocabulary(self, token: int) -> None:
        tokenizer = _byte_level("gpt-2")
        for use in (lambda: tokenizer.decode([token]), lambda: tokenizer.stream().push(token)):
            with pytest.raises(ValueError, match=f"{token} is outside the vocabulary"):
                use()


class TestStream:
    @settings(deadline=None, max_examples=200)
    @given(data=st.data())
    def test_the_pieces_joined_are_the_decoded_text(self, data: st.DataObject) -> None:
        tokenizer = data.draw(st.sampled_from([_byte_level("gpt-2"), _spm(), _spm_without_prefix()]))
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
        stream = tokenizer.stream()
        pieces = [*(stream.push(token) for token in ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)

    @settings(deadline=None, max_examples=100)
    @given(text=texts)
    def test_a_piece_never_holds_half_a_character(self, text: str) -> None:
        for tokenizer in (_byte_level("llama-bpe"), _spm()):
            stream = tokenizer.stream()
            pieces = [stream.push(token) for token in tokenizer.encode(text)]
            assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
            assert (stream.flush(), "".join(pieces)) == ("", text)

    def test_an_unfinished_character_is_replaced_at_the_end(self) -> None:
        tokenizer = _spm()
        half = [3 + byte for byte in "🦙".encode()[:3]]
        stream = tokenizer.stream()
        assert [stream.push(token) for token in half] == ["", "", ""]
        assert stream.flush() == "\ufffd" == tokenizer.decode(half)

    def test_a_continuation_keeps_its_leading_space(self) -> None:
        tokenizer = _spm()
        token = tokenizer.encode("ab", add_special=False)[0]
        assert tokenizer.stream().push(token) == "ab"
        assert tokenizer.stream(at_start=False).push(token) == " ab"


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tokens, merges = _trained_byte_level()
        pairs = [tuple(merge.split(" ")) for merge in merges]
        model = tokenizers.models.BPE({text: i for i, text in enumerate(tokens)}, pairs)
        library = tokenizers.Tokenizer(model)
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
        library.add_tokens(["<tool>"])
        library.save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "chat_template": "from config"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    def test_it_encodes_as_the_same_vocabulary_in_gguf(self, folder: Path) -> None:
        ours = Tokenizer.from_folder(folder)
        for text in AWKWARD_TEXTS:
            ids = ours.encode(text)
            assert ids == _byte_level("gpt-2").encode(text)
            assert ours.decode(ids, skip_special=False) == text

    def test_special_tokens_are_read_on_request_only(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")
        ids = tokenizer.encode("a<|im_end|><tool>", parse_special=True)
        assert tokenizer.eos_id in ids
        assert tokenizer.decode(ids) == "a<tool>"

    def test_stops_come_from_every_file(self, folder: Path) -> None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
        tokenizer = Tokenizer.from_folder(folder)
        names = {tokenizer.token_bytes(token) for token in tokenizer.stop_ids - {3, 5}}
        assert names == {b"<|endoftext|>", b"<|im_end|>"}
        assert {3, 5} <= tokenizer.stop_ids

    def test_the_configuration_overrides_bos(self, folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        assert not Tokenizer.from_folder(folder).add_bos
        path.write_text(json.dumps({"bos_token": "<|endoftext|>", "add_bos_token": True}))
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.add_bos and tokenizer.encode("") == [tokenizer.bos_id]

    def test_the_template_file_comes_before_the_configuration(self, folder: Path) -> None:
        assert Tokenizer.from_folder(folder).chat_template == "from config"
        (folder / "chat_template.jinja").write_text("from file")
        assert Tokenizer.from_folder(folder).chat_template == "from file"

    def test_files_with_a_byte_order_mark_are_read(self, folder: Path) -> None:
        wanted = Tokenizer.from_folder(folder)
        (folder / "chat_template.jinja").write_bytes(b"{# a #}\r\nfrom file\r\n")
        for path in (folder / "tokenizer_config.json", folder / "chat_template.jinja"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.chat_template == "{# a #}\nfrom file\n"
        assert tokenizer.eos_id == wanted.eos_id and tokenizer.encode("ab c") == wanted.encode("ab c")

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("tokenizer_config.json", {"eos_token": 2}, "eos_token must be a string, or an object"),
            (
                "tokenizer_config.json",
                {"bos_token": {"content": 1}},
                "bos_token must be a string, or an object",
            ),
            (
                "tokenizer_config.json",
                {"add_bos_token": "yes"},
                "add_bos_token must be true or false, got 'yes'",
            ),
            (
                "tokenizer_config.json",
                {"chat_template": 3},
                "chat_template must be a string, or a list of named strings",
            ),
            ("special_tokens_map.json", {"bos_token": [1]}, "bos_token must be a string, or an object"),
            (
                "generation_config.json",
                {"eos_token_id": "two"},
                "eos_token_id must be an integer, got 'two'",
            ),
            (
                "generation_config.json",
                {"eos_token_id": [2, None]},
                "eos_token_id must be a list of integers",
            ),
            ("config.json", {"bos_token_id": 1.5}, "bos_token_id must be an integer, got 1.5"),
            ("config.json", [], "must hold a JSON object"),
        ],
    )
    def test_keys_have_their_type_checked(self, folder: Path, file: str, content: Any, message: str) -> None:
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(ModelError, match=f"{file}: {message}") as caught:
            Tokenizer.from_folder(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("metaspace", [False, True])
    def test_a_sentencepiece_folder(self, tmp_path: Path, metaspace: bool) -> None:
        words = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            "a",
            "b",
            "ab",
            "▁ab",
        ]
        merges = [("a", "b"), ("▁", "ab")]
        model = tokenizers.models.BPE(
            {text: i for i, text in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>"
        )
        library = tokenizers.Tokenizer(model)
        decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
        if metaspace:
            library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            library.decoder = decoders.Sequence(
                [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
            )
        else:
            library.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            library.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        library.add_special_tokens(words[:3])
        library.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, True, {2})
        assert token_texts(tokenizer, "ab é") == [b"<s>", b" ab", b" ", b"\xc3", b"\xa9"]
        # Metaspace adds no space before one that is there, but drops it anyway.
        for text in ["ab", "ab  ab 🦙", "a\nb", *([] if metaspace else ["  ab"])]:
            stream = tokenizer.stream()
            pieces = [*map(stream.push, tokenizer.encode(text)), stream.flush()]
            assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_folder_without_a_tokenizer_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match="is not a tokenizer"):
            Tokenizer.from_folder(tmp_path)


VOCABULARIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "vocab"


@pytest.mark.parametrize(
    "path", sorted(VOCABULARIES.glob("*.gguf")) or [None], ids=lambda path: path and path.stem
)
def test_real_vocabularies_give_the_expected_tokens(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"no vocabularies at {VOCABULARIES}")
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields
    metadata = {key: fields[key].contents() for key in fields if key.startswith(("tokenizer.", "general."))}
    tokenizer = Tokenizer.from_gguf(metadata)
    inputs = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{path}.out").read_text().split("\n")[: len(inputs)]
    for text, expected in zip(inputs, outputs, strict=True):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == [int(number) for number in expected.split()], text
        assert tokenizer.decode(ids) == text


@lru_cache
def _byte_level(pre: str) -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata(pre))


@lru_cache
def _spm() -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata())


@lru_cache
def _spm_without_prefix() -> Tokenizer:
    return Tokenizer.from_gguf(spm_metadata(add_space_prefix=False))
