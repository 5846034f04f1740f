"""The tokenizer: exact round trip, white-space pieces, special tokens that text cannot forge."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError, train_tokenizer

SCRIPT = """import pandas as pd
from sklearn.linear_model import Ridge

train = pd.read_csv( "train.csv" )
for column in train.columns :
    if train[ column ].dtype == "object" :
        train[ column ] = train[ column ].fillna( "none" )
model = Ridge( alpha = 0.412 ) . fit( train , train[ "target" ] )
"""
DIGEST = "valid_frac first 0.833 last 0.125 spark 9 9 5 2 1 mark valid_falling\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SCRIPT, DIGEST] * 50, vocab_size=512)


TRICKY = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, " ", "\n", "\t", "  ", "\u00a0", "\u2028", "a", "9", "é", "<"]
    )
).map("".join)


@settings(deadline=None)
@given(text=TRICKY, specials=st.booleans())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str, specials: bool) -> None:
    ids = tokenizer.encode(text, specials=specials)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@settings(deadline=None)
@given(text=TRICKY)
def test_text_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    special_ids = {tokenizer.token_id(token) for token in SPECIAL_TOKENS}
    assert not special_ids & set(tokenizer.encode(text, specials=False))


def test_kept_ids_are_not_shared_with_the_caller(tokenizer: Tokenizer) -> None:
    first = tokenizer.encode("a <think> b")
    first.append(0)
    assert tokenizer.encode("a <think> b") == first[:-1]
    assert tokenizer.encode("a <think> b", specials=False) != first[:-1]


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("]~!b[]~b]ai\n<think>")[:2] == [1, 3]
    assert tokenizer.decode([1, 5, 2], skip_specials=True) == ""


def test_pieces_split_at_white_space_only(tokenizer: Tokenizer) -> None:
    whole = train_tokenizer([SCRIPT] * 50, vocab_size=1024)
    pieces = [whole.decode([i]) for i in whole.encode('x = pd.read_csv( "train.csv" )\n    if')]
    assert " pd.read_csv(" in pieces and ' "train.csv"' in pieces
    assert pieces[-1] == " if"  # the last space of an indentation belongs to the word


def test_digits_after_a_space_are_single_tokens(tokenizer: Tokenizer) -> None:
    without_digits = train_tokenizer(["no numbers here at all"] * 20, vocab_size=300)
    for some in (tokenizer, without_digits):
        ids = some.encode(" 0 1 2 3 4 5 6 7 8 9")
        assert len(ids) == len(set(ids)) == 10


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash and again.vocab_size == tokenizer.vocab_size
    assert again.encode(SCRIPT) == tokenizer.encode(SCRIPT)


def test_training_is_repeatable(tokenizer: Tokenizer) -> None:
    assert train_tokenizer([SCRIPT, DIGEST] * 50, vocab_size=512).hash == tokenizer.hash


def test_transformers_reads_the_saved_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(SCRIPT, add_special_tokens=False) == tokenizer.encode(SCRIPT)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.pad_token_id == tokenizer.pad_id


def test_unusable_files_are_named(tmp_path) -> None:
    with pytest.raises(TokenizerError, match="does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="vocab_size 100"):
        train_tokenizer(["a"], vocab_size=100)


def test_a_foreign_tokenizer_is_refused() -> None:
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
    with pytest.raises(TokenizerError, match="lacks the special token"):
        Tokenizer(plain)


def test_a_vocabulary_without_padding_pads_with_its_end_mark(
    tokenizer: Tokenizer, tmp_path
) -> None:
    """The released tokenizer has no `<pad>`."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<spare>"'))
    assert Tokenizer.load(tmp_path).pad_id == tokenizer.eos_id
