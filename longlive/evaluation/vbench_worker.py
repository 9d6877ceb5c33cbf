"""Runs one dimension of the real `vbench` in its own environment: `python vbench_worker.py REQUEST.json`.

Nothing of longlive is imported here. VBench's own code measures. Two things are replaced: how it finds videos (it lists a folder, assumes
the extension of the first name for all, and takes at most five videos per prompt), and how long the clips of VBench-Long are (it takes the
longest that any dimension of the prompt wants, so that aesthetic and imaging quality get ten seconds instead of two: VBench issue 186).
"""

import json
import os
import shutil
import sys
from pathlib import Path

STATIC_KEPT = 5  # videos, or clips, per prompt that stand still enough for temporal flickering


def put(path, make):
    """Have `make` write the file, atomically, unless it exists: the workers of several GPUs start at the same time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        make(unfinished)
        os.replace(unfinished, path)


def prepare_files(cache):
    """Put files that are installed, or have another name, where vbench looks for them."""
    import clip

    name = "bpe_simple_vocab_16e6.txt.gz"
    put(cache / "ViCLIP" / name, lambda path: shutil.copyfile(Path(str(clip.__file__)).parent / name, path))
    dino = cache / "dino_model" / "dino_vitbase16_pretrain.pth"
    if dino.exists():
        put(cache / "torch" / "hub" / "checkpoints" / dino.name, lambda path: path.symlink_to(dino.resolve()))


def load_dreamsim_from(cache, device):
    """Have VBench-Long read DreamSim in the cache folder and put it on this device; it hard-codes ~/.cache and CUDA."""
    from dreamsim import dreamsim
    from vbench2_beta_long import background_consistency

    hub = cache / "dreamsim"  # DreamSim makes it torch's hub, to load DINO from it
    code, dino = cache / "dino_model" / "facebookresearch_dino_main", cache / "dino_model" / "dino_vitbase16_pretrain.pth"
    put(hub / code.name, lambda path: path.symlink_to(code.resolve()))
    put(hub / "checkpoints" / dino.name, lambda path: path.symlink_to(dino.resolve()))

    def load(**options):
        return dreamsim(**options | {"cache_dir": str(hub), "device": str(device)})

    background_consistency.dreamsim = load


def still(entries, device, cache):
    """The entries with only those videos that pass VBench's static filter, at most five per prompt."""
    import torch
    from easydict import EasyDict
    from vbench.cli import static_filter

    class Filter(static_filter.StaticFilter):
        def load_model(self):
            model = torch.nn.DataParallel(static_filter.RAFT(self.args))
            model.load_state_dict(torch.load(self.args.model, map_location="cpu"))
            self.model = model.module.to(self.device).eval()

    static_filter.DEVICE = device
    model = cache / "raft_model" / "models" / "raft-things.pth"
    raft = Filter(EasyDict(model=str(model), small=False, mixed_precision=False, alternate_corr=False), device)
    for entry in entries:
        kept = []
        for path in entry["video_list"]:
            if len(kept) < STATIC_KEPT and raft.infer(path):
                kept.append(path)
        entry["video_list"] = kept
    if not any(entry["video_list"] for entry in entries):
        raise SystemExit("RAFT finds no video still enough for temporal flickering")
    return entries


def measure(request):
    import torch
    from vbench import VBench
    from vbench.utils import save_json

    device, dimension = torch.device(request["device"]), request["dimension"]
    work, output = Path(request["work"]), Path(request["output"])
    cache = Path(os.environ["VBENCH_CACHE_DIR"])
    entries = request["entries"]

    def listed(self, videos_path, name, dimension_list, *args, **kwargs):
        found = clips_of(entries) if request["clips"] else entries
        if request["static_filter"]:
            found = still(found, request["device"], cache)
        path = output / f"{name}_full_info.json"
        save_json(found, str(path))
        return str(path)

    options = {"imaging_quality_preprocessing_mode": "longer"}
    if request["clips"]:
        from vbench2_beta_long import VBenchLong
        from vbench2_beta_long.utils import split_video_into_clips

        split = work / "split_clip"

        def cut(self, *args, **kwargs):
            shutil.rmtree(work, ignore_errors=True)  # half a clip of a run that was stopped would be taken for a whole one
            split.mkdir(parents=True)
            for entry in entries:
                for path in entry["video_list"]:
                    split_video_into_clips(path, str(split), int(entry["clip_seconds"]))

        def clips_of(entries):
            cut_up = []
            for entry in entries:
                folders = [split / Path(path).stem for path in entry["video_list"]]
                cut_up.append({**entry, "video_list": [str(clip) for folder in folders for clip in sorted(folder.glob("*.mp4"))]})
            return cut_up

        work.mkdir(parents=True, exist_ok=True)
        kind = type("Listed", (VBenchLong,), {"build_full_info_json": listed, "preprocess": cut})
        options |= across_clips(request["slow_fast"], work)
        if request["slow_fast"] is not None:
            load_dreamsim_from(cache, device)
    else:
        kind = type("Listed", (VBench,), {"build_full_info_json": listed})
    benchmark = kind(device, request["full_info"], str(output))
    mode = "long_vbench_standard" if request["clips"] else "vbench_standard"
    with torch.no_grad():  # scene and background consistency lack it, and the graph of 16 images of a scene takes over 20 GB
        benchmark.evaluate(videos_path=str(work), name=dimension, dimension_list=[dimension], local=True, mode=mode, **options)


def across_clips(slow_fast, work):
    """VBench-Long's comparison of clips with each other: with weight zero, its program's default, or as the tables in `slow_fast` say."""
    options = {"w_inclip": 1.0, "w_clip2clip": 0.0, "static_filter_flag": False, "dev_flag": slow_fast is not None}
    if slow_fast is not None:
        tables, names = Path(slow_fast), ("slow_fast_params.yaml", "subject_mapping_table.yaml", "background_mapping_table.yaml")
        extractors = ("dinov2", "dreamsim")
    else:
        tables, names, extractors = work.with_name(f"{work.name}-tables"), ("none.yaml", "same.yaml", "same.yaml"), ("dino", "clip")
        tables.mkdir(parents=True, exist_ok=True)
        (tables / "none.yaml").write_text("{}\n")
        (tables / "same.yaml").write_text("0.0: 0.0\n1.0: 1.0\n")
    files = ("slow_fast_eval_config", "sb_mapping_file_path", "bg_mapping_file_path")
    options |= {option: str(tables / name) for option, name in zip(files, names)}
    return options | dict(zip(("sb_clip2clip_feat_extractor", "bg_clip2clip_feat_extractor"), extractors))


def main():
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cache = Path(os.environ["VBENCH_CACHE_DIR"])
    for name in ("HF_HUB", "HUGGINGFACE_HUB", "TRANSFORMERS", "PYTORCH_TRANSFORMERS", "PYTORCH_PRETRAINED_BERT"):
        os.environ.pop(f"{name}_CACHE", None)  # they have precedence over HF_HOME
    os.environ |= {"TORCH_HOME": str(cache / "torch"), "HF_HOME": str(cache / "huggingface")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # or it asks for newer files, five times each when offline
    prepare_files(cache)
    measure(request)


if __name__ == "__main__":
    main()
