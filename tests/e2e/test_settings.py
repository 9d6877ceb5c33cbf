"""Every setting of `InferenceConfig` changes what it says, and nothing else: a table of settings and of the facts they change."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longlive import video
from longlive.checkpoints.lora import LoraFile
from longlive.config import InferenceConfig
from longlive.programs import inference, loading
from tests.e2e.test_programs import StandIn

PLAIN = ("model=.", "prompt=a", "num_latent_frames=3", "scale=1", "device=cpu")
INSTEAD_OF = {"prompts": "prompt", "seconds": "num_latent_frames", "num_frames": "num_latent_frames", "wan_dir": "model"}
FILES = {
    "a.txt": "one\ntwo\n",
    "b.jsonl": '{"prompts": ["one", "two"]}\n',
    "weights.pt": "",
    "lora.pt": "",
    "taew2_1.pth": "",
}


class Watched(StandIn):
    """A stand-in for the pipeline that writes down what is asked of it."""

    facts: dict

    @classmethod
    def from_pretrained(cls, model, *, torch_dtype, attention, **sampling):
        cls.facts |= {"loaded": model, "dtype": torch_dtype, "attention": attention, **sampling}
        return cls()

    @classmethod
    def from_original(cls, *files, torch_dtype, attention, **sampling):
        cls.facts |= {"loaded": files, "dtype": torch_dtype, "attention": attention, **sampling}
        return cls()

    def load_lora_weights(self, path, **settings):
        self.facts["lora"] = [*self.facts.get("lora", ()), (path, *settings.values())]

    def fuse_lora(self):
        pass

    def to(self, device):
        self.facts["on"] = str(device)

    def accelerate(self, **settings):
        self.facts |= settings

    def place_text_encoder(self, mode):
        self.facts["text encoder"] = mode

    def session(self, prompts, **settings):
        made = self.facts.setdefault("videos", [])
        length = settings.get("num_latent_frames") or {"num_frames": settings["num_frames"]}
        made.append({"prompts": [cue.prompt for cue in prompts.cues], "length": length, "seed": settings["seed"]})
        for name in ("image", "video"):
            if name in settings:
                self.facts[name] = np.asarray(settings.pop(name)).shape
        self.facts["switches"] = [dataclasses.astuple(cue)[0] for cue in prompts.cues][1:]
        return super().session(prompts, **settings)


def facts_of(folder, *settings):
    """What a run of the program in an empty folder did."""
    threads, pipeline = torch.get_num_threads(), type("Pipeline", (Watched,), {"facts": {}})
    said = {setting.partition("=")[0] for setting in settings}
    said |= {INSTEAD_OF[name] for name in said & INSTEAD_OF.keys()}
    words = [word for word in PLAIN if word.partition("=")[0] not in said]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loading, "LongLivePipeline", pipeline)
        for name, content in FILES.items():
            Path(name).write_text(content)
        Image.new("RGB", (6, 4), "red").save("a.png")
        with video.VideoWriter("a.mp4") as writer:
            writer.write(np.zeros((9, 32, 48, 3), np.uint8))
        Path("a.mp4").rename("a.video")
        assert inference.main([*words, *settings], description="a test", default_config=Path("none.yaml")) == 0
        first, *_ = files = sorted(Path(".").rglob("*.mp4"))
        crf = re.search(rb"crf=([\d.]+)", first.read_bytes())[1].decode()  # x264 writes its settings into the stream
        written = {"folders": sorted({str(path.parent) for path in files}), "size": video.probe(first)[1:3], "crf": crf}
    facts = pipeline.facts | written | {"threads": torch.get_num_threads()}
    torch.set_num_threads(threads)
    return facts


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return facts_of(tmp_path_factory.mktemp("plain"))


def one(**changes):
    return {"videos": [{"prompts": ["a"], "length": 3, "seed": 0} | changes]}


TABLE = {
    "model": (["model=.."], {"loaded": ".."}),
    "wan_dir": (["wan_dir=.", "checkpoint=weights.pt"], {"loaded": (".", "weights.pt", [])}),
    "checkpoint": (
        ["wan_dir=.", "checkpoint=lora.pt", "lora=weights.pt"],
        {"loaded": (".", "lora.pt", [LoraFile("weights.pt")])},
    ),
    "which": (["wan_dir=.", "checkpoint=lora.pt", "which=ema"], {"loaded": (".", "lora.pt", []), "which": "ema"}),
    "lora": (
        ["lora=[lora.pt:0.8,{path: weights.pt, strength: 2, alpha: 3}]"],
        {"lora": [("lora.pt", 0.8, None, None), ("weights.pt", 2.0, 3.0, None)]},
    ),
    "lora_alpha": (
        ["--lora", "lora.pt", "--lora=weights.pt:2", "lora_alpha=8"],
        {"lora": [("lora.pt", 1.0, 8.0, None), ("weights.pt", 2.0, 8.0, None)]},
    ),
    "dtype": (["dtype=bfloat16"], {"dtype": torch.bfloat16}),
    "threads": (["threads=2"], {"threads": 2}),
    "text_encoder": (["text_encoder=on_demand"], {"text encoder": "on_demand"}),
    "attention": (["attention=sdpa"], {"attention": "sdpa"}),
    "compile": (["compile=true"], {"compile": True}),
    "decoder": (["decoder=tiny"], {"decoder": "tiny"}),
    "quantize": (["quantize=int8-weights"], {"quantize": "int8-weights"}),
    "quantize_cache": (["quantize_cache=fp8"], {"quantize_cache": "fp8"}),
    "decode_latent_frames": (["decode_latent_frames=1"], {"decode_latent_frames": 1}),
    "prompt": (["prompt=b c"], one(prompts=["b c"])),
    "prompts": (["prompts=a.txt"], {"videos": one(prompts=["one"])["videos"] + one(prompts=["two"])["videos"]}),
    "seconds": (["seconds=1"], one(length=6)),
    "num_latent_frames": (["num_latent_frames=9"], one(length=9)),
    "num_frames": (["num_frames=21"], one(length={"num_frames": 21})),
    "image": (["image=a.png"], {"image": (4, 6, 3), **one(length=4)}),
    "continue_from": (["--continue", "a.video"], {"video": (9, 32, 48, 3)}),
    "height": (["height=64"], {"size": (64, 32)}),
    "width": (["width=64"], {"size": (32, 64)}),
    "seed": (["seed=5"], one(seed=5)),
    "num_samples": (["num_samples=2"], {"videos": one()["videos"] + one(seed=1)["videos"]}),
    "switch_frame_indices": (
        ["prompts=b.jsonl", "switch_frame_indices=[3]", "num_latent_frames=6"],
        {"switches": [3], **one(prompts=["one", "two"], length=6)},
    ),
    "window": (["window=9"], {"window": 9}),
    "sink": (["sink=1"], {"sink": 1}),
    "denoising_steps": (["denoising_steps=[1000,500]"], {"denoising_steps": (1000, 500)}),
    "timestep_shift": (["timestep_shift=3"], {"timestep_shift": 3.0}),
    "context_timestep": (["context_timestep=100"], {"context_timestep": 100.0}),
    "keep_sink": (["keep_sink=false"], {"keep_sink": False}),
    "recache": (["recache=causal"], {"recache": "causal"}),
    "relative_rope": (["relative_rope=true"], {"relative_rope": True}),
    "output": (["output=elsewhere"], {"folders": ["elsewhere"]}),
    "scale": (["scale=2"], {"size": (64, 64)}),
    "crf": (["crf=30"], {"crf": "30.0"}),
}  # fmt: skip
# test_programs.py: a timeline is made again, a device and graphs are refused, a video is made again; test_memory.py: low_memory
# test_terminal.py: the pace, and what is shown while a person types
ELSEWHERE = {"timeline", "device", "graphs", "overwrite", "low_memory", "realtime", "show"}


def test_the_table_has_every_setting():
    assert TABLE.keys() | ELSEWHERE == {field.name for field in dataclasses.fields(InferenceConfig)}


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_changes_what_it_says_and_nothing_else(plain, tmp_path, name):
    settings, expected = TABLE[name]
    changed = facts_of(tmp_path, *settings)
    assert {fact: changed.get(fact) for fact in plain.keys() | changed.keys() if changed.get(fact) != plain.get(fact)} == expected
