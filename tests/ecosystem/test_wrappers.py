"""What wraps a model, by the doors that it is passed to: its tokens, or one sentence that says what
to pass instead."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

import kvtools  # noqa: E402

IDS = torch.arange(40, 60)[None]
NEW = 6


def compiled(model):
    return torch.compile(model, backend="eager", dynamic=True)


def lora(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def prepared(model, **options):
    accelerate.state.AcceleratorState._reset_state()
    return accelerate.Accelerator(cpu=True, **options).prepare_model(model, evaluation_mode=True)


def dispatched(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu")


def offloaded(model):
    return accelerate.cpu_offload(model, torch.device("cpu"))


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


WRAPPERS = {
    "torch.compile(model)": compiled,
    "PeftModel (LoRA)": lora,
    "torch.compile(PeftModel)": lambda model: compiled(lora(model)),
    "Accelerator.prepare": prepared,
    "Accelerator(mixed_precision='bf16').prepare": lambda model: prepared(
        model, mixed_precision="bf16"
    ),
    "accelerate.dispatch_model": dispatched,
    "accelerate.cpu_offload": offloaded,
    "FSDP2 (fully_shard)": fsdp2,
    "DataParallel": torch.nn.DataParallel,
    "DDP": ddp,
}


@torch.no_grad()
def generate(model, **options):
    return model.generate(IDS, max_new_tokens=NEW, do_sample=False, **options)[0, IDS.shape[1] :]


def by_generate(model):
    return generate(model, custom_generate=kvtools.generate)


def by_patch(model):
    with kvtools.patch(model):
        return generate(model)


def by_rollouts(model):
    rollouts = kvtools.Rollouts(model, temperature=0.0)
    rollouts.prefill(IDS.tolist(), n=1)
    rollouts.generate(max_new_tokens=NEW)
    return torch.tensor(rollouts.tokens[0][IDS.shape[1] :])


def by_logprobs(model):
    """The likeliest tokens are those that the model itself says."""
    tokens = generate(getattr(model, "module", model))
    found = kvtools.logprobs(model, IDS.tolist(), [[tokens.tolist()]])
    return torch.where(found.greedy[0][0], tokens, -1)


DOORS = {"patch": by_patch, "Rollouts": by_rollouts, "logprobs": by_logprobs}
DOORS = {"generate": by_generate} | DOORS
REFUSED = {"DataParallel", "DDP"}


@pytest.fixture(scope="module")
def group():
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_by_door(name, model, group, record):
    model.generation_config.eos_token_id = None
    wrapped = WRAPPERS[name](copy.deepcopy(model))
    for door, run in DOORS.items():
        if name in REFUSED:
            if door == "generate":  # the wrapper has none to pass anything to
                continue
            with pytest.raises(TypeError, match=r"pass the model inside .*, its \.module"):
                run(wrapped)
            assert torch.equal(run(wrapped.module), generate(model))
        else:
            found = run(wrapped)
            assert found.tolist() == generate(wrapped).tolist(), door
    result = "refused: pass its `.module`" if name in REFUSED else "tokens of plain `generate`"
    package = "peft" if "Peft" in name else "accelerate" if "ccelerat" in name else "torch"
    record(package, f"by {', '.join(DOORS)}: {name}", result)


def test_a_saved_cache_knows_its_adapters(model, tmp_path):
    """Of peft: which are on, and how much each counts."""
    wrapped, path = lora(copy.deepcopy(model)), tmp_path / "cache"
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped.add_adapter("other", config)
    how = dict(custom_generate=kvtools.generate, return_dict_in_generate=True)
    out = wrapped.generate(IDS, max_new_tokens=NEW, do_sample=False, **how)
    base = wrapped.get_base_model()  # which ran
    kvtools.save_cache(base, out[kvtools.hf.CACHE], path)
    assert kvtools.load_cache(base, path).kv.rows == 1
    with (
        wrapped.disable_adapter(),
        pytest.raises(ValueError, match="adapters='default', not 'off'"),
    ):
        kvtools.load_cache(base, path)
    wrapped.set_adapter("other")
    with pytest.raises(ValueError, match="adapters='default', not 'other'"):
        kvtools.load_cache(base, path)
    wrapped.set_adapter("default")
    layer = base.model.layers[0].self_attn.q_proj
    layer.scale_layer(0.5)
    with pytest.raises(ValueError, match="another model: weights="):
        kvtools.load_cache(base, path)
    layer.scale_layer(2)
    assert kvtools.load_cache(base, path).kv.rows == 1
    with pytest.raises(ValueError, match="adapters='default', not None"):
        kvtools.load_cache(model, path)
