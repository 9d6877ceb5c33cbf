"""What comes from disk is what the encoder gave, to the bit; it is asked once for each prompt, and not at all when it is gone."""

import threading

import pytest
import torch

from longlive.miniature.language import TEXT_LEN, build_text_encoder, build_tokenizer
from longlive.models.text import TextEncoder
from longlive.training.embeddings import TextEmbeddings, address, fingerprint

PROMPTS = ["a red circle", "a blue ring moving up on a black background", "x"]


def make(seed=0, **settings):
    tokenizer = build_tokenizer()
    return TextEncoder(build_text_encoder(len(tokenizer), seed=seed), tokenizer, **({"text_len": TEXT_LEN} | settings))


@pytest.fixture(scope="module")
def encoder():
    return make()


class Counted:
    """An encoder that notes what it was asked."""

    def __init__(self, encode):
        self.encode, self.asked = encode, []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        return self.encode(prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [True, False])
def test_kept_embeddings_are_the_encoders_own(tmp_path, on_disk, dtype):
    encoder = make(dtype=dtype)
    encode = Counted(encoder.encode)
    embeddings = TextEmbeddings(tmp_path if on_disk else None, encode, name="toy")
    wanted = encoder.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    for _ in range(2):
        text = embeddings([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
        assert text.dtype == dtype and torch.equal(text, wanted)
    assert encode.asked == [PROMPTS[:2]]
    assert torch.equal(embeddings("  a red \n circle "), wanted[:1])  # cleaned, it is the same prompt
    assert len(encode.asked) == 1
    text.zero_()  # what is handed out is the caller's
    assert torch.equal(embeddings(PROMPTS[:2]), wanted[:2])


def test_prepare_asks_once_and_then_the_encoder_may_go(tmp_path, encoder):
    encode = Counted(encoder.encode)
    embeddings = TextEmbeddings(tmp_path, encode, name=fingerprint(encoder))
    embeddings(PROMPTS[:1])
    assert embeddings.prepare([*PROMPTS, "x  ", *PROMPTS], batch=1) == 2
    assert [len(prompts) for prompts in encode.asked] == [1, 1, 1]
    assert embeddings.prepare(PROMPTS, batch=4) == 0
    embeddings.encode = None
    for without in (embeddings, TextEmbeddings(tmp_path, None, name=fingerprint(encoder))):
        assert torch.equal(without(PROMPTS), encoder.encode(PROMPTS))
        with pytest.raises(ValueError, match=r'1 prompts have no embedding .*"a new one"'):
            without(["a new one", PROMPTS[0]])
        with pytest.raises(ValueError, match="there is no encoder"):
            without.prepare(["a new one"], batch=1)
    with pytest.raises(ValueError, match="there is no encoder"):
        TextEmbeddings(tmp_path, None, name="another")(PROMPTS)


def test_only_what_was_said_is_on_disk(tmp_path):
    text = torch.zeros(3, 512, 64)
    text[0, :5] = 1
    text[1, :7] = 1
    text[1, 3] = 0  # a zero before the end is kept
    embeddings = TextEmbeddings(tmp_path, lambda prompts: text, name="toy")
    assert torch.equal(embeddings(PROMPTS), text) and torch.equal(embeddings(PROMPTS), text)
    sizes = [(tmp_path / "toy" / address(prompt)[:2] / f"{address(prompt)}.safetensors").stat().st_size for prompt in PROMPTS]
    assert [size // (64 * 4) for size in sizes] == [5, 7, 0]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


def test_ranks_may_write_the_same_prompt_at_once(tmp_path):
    meet = threading.Barrier(4)
    text = torch.arange(1.0, 8 * 3 * 4 + 1).reshape(8, 3, 4)
    prompts = [f"prompt {i}" for i in range(8)]
    results = []

    def encode(prompts):
        meet.wait(timeout=30)  # nobody has written yet
        return text

    threads = [threading.Thread(target=lambda: results.append(TextEmbeddings(tmp_path, encode, name="toy")(prompts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, text) for result in results)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 8


def test_what_is_not_an_embedding_is_refused_and_not_kept(tmp_path):
    broken = torch.full((1, 4, 8), float("nan"))
    embeddings = TextEmbeddings(tmp_path, lambda prompts: broken, name="toy")
    with pytest.raises(ValueError, match="not finite"):
        embeddings(["a"])
    with pytest.raises(ValueError, match=r"returned \(1, 4, 8\) for 2 prompts"):
        embeddings(["a", "b"])
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    embeddings.encode = lambda prompts: torch.ones(1, 4, 8)
    embeddings(["a"])
    embeddings.encode = lambda prompts: torch.ones(1, 5, 8)
    with pytest.raises(ValueError, match="not all of one encoder"):
        embeddings(["a", "b"])
    next(tmp_path.rglob(f"{address('a')}*")).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        embeddings(["a"])
    for name in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="name"):
            TextEmbeddings(tmp_path, None, name=name)


def test_a_fingerprint_tells_encoders_apart(encoder):
    own = fingerprint(encoder)
    assert own == fingerprint(make()) and len(own) == 16
    assert len({own, fingerprint(make(seed=1)), fingerprint(make(text_len=16)), fingerprint(make(dtype=torch.bfloat16))}) == 4
    tuned = make()
    with torch.no_grad():
        tuned.encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(1.01)
    assert fingerprint(tuned) != own
    spoken = make()
    spoken.tokenizer.add_tokens(["zebra"])
    assert fingerprint(spoken) != own
