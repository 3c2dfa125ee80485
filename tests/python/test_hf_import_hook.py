"""What is to happen after an import happens once, in either order, and never breaks the import."""

import subprocess
import sys
import textwrap
import threading

import pytest

import qlora_native
from qlora_native.hf import import_hook


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package on the path that nobody has imported; its name."""
    (tmp_path / "awaited_library").mkdir()
    (tmp_path / "awaited_library" / "__init__.py").write_text("__version__ = '7.8'\n")
    (tmp_path / "awaited_library" / "part.py").write_text("value = 1\nfrom time import sleep\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(import_hook, "_failures", {})
    yield "awaited_library.part"
    for name in ("awaited_library", "awaited_library.part"):
        sys.modules.pop(name, None)
        import_hook._pending.pop(name, None)


def test_runs_once_after_the_module_is_complete(library):
    seen = []
    import_hook.after_import(library, lambda: seen.append(sys.modules[library].value))
    import awaited_library

    assert seen == []
    import awaited_library.part
    import awaited_library.part as again

    assert seen == [1]
    assert again is awaited_library.part


def test_runs_at_once_when_the_module_is_there(library):
    import awaited_library.part  # noqa: F401

    seen = []
    import_hook.after_import(library, lambda: seen.append(1))
    assert seen == [1]


def test_all_actions_run_in_order_and_one_may_be_named(library, monkeypatch):
    seen = []
    monkeypatch.setattr(import_hook, "for_this_test", lambda: seen.append(2), raising=False)
    import_hook.after_import(library, lambda: seen.append(1))
    import_hook.after_import(library, "qlora_native.hf.import_hook:for_this_test")
    import awaited_library.part  # noqa: F401

    assert seen == [1, 2]


def test_the_loader_is_the_one_that_would_be_there_anyway(library):
    import_hook.after_import(library, lambda: None)
    import awaited_library
    import awaited_library.part

    assert type(awaited_library.part.__loader__) is type(awaited_library.__loader__)


def test_a_failing_action_warns_and_is_told_on_use(library):
    def moved():
        raise AttributeError("module has no attribute 'dispatch'")

    import_hook.after_import(library, moved)
    import_hook.require(library)
    with pytest.warns(RuntimeWarning, match=r"awaited_library 7\.8: AttributeError: .*dispatch"):
        import awaited_library.part
    assert awaited_library.part.value == 1
    with pytest.raises(import_hook.IntegrationError, match="Install a version of awaited_library"):
        import_hook.require(library)


def test_a_module_that_another_thread_is_importing_is_awaited(library, tmp_path):
    part = tmp_path / "awaited_library" / "part.py"
    part.write_text("import time\nstarted.set()\ntime.sleep(0.2)\nvalue = 1\n")
    import builtins

    started = builtins.started = threading.Event()
    thread = threading.Thread(target=__import__, args=(library,))
    try:
        thread.start()
        assert started.wait(10)
        seen = []
        import_hook.after_import(library, lambda: seen.append(sys.modules[library].value))
        assert seen == [1]
    finally:
        thread.join()
        del builtins.started


@pytest.fixture
def quantizers(monkeypatch):
    """Registering again, with what fails told to nobody else."""
    import transformers.quantizers

    monkeypatch.setattr(import_hook, "_failures", {})
    name = transformers.quantizers.__name__
    return name, lambda: import_hook.after_import(name, "qlora_native.hf.quantizer:register")


@pytest.mark.parametrize("version", ["4.57.1", "5.9.0", "6.0.0.dev0"])
def test_another_version_of_transformers_is_told(quantizers, monkeypatch, version):
    import transformers

    _, register = quantizers
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.warns(RuntimeWarning, match=rf"{version} is not one of 5.10 to 5.x"):
        register()
    with pytest.raises(import_hook.IntegrationError, match="Install a version of transformers"):
        qlora_native.QLoRANativeConfig()


@pytest.mark.parametrize("version", ["5.10.0", "5.17.0", "5.23.0", "5.99.1"])
def test_supported_versions_register(quantizers, monkeypatch, version):
    import transformers

    name, register = quantizers
    monkeypatch.setattr(transformers, "__version__", version)
    register()
    import_hook.require(name)


def test_a_hook_that_moved_is_named(quantizers, monkeypatch):
    from transformers.quantizers.base import HfQuantizer

    _, register = quantizers
    monkeypatch.delattr(HfQuantizer, "param_element_size")
    with pytest.warns(RuntimeWarning, match="HfQuantizer has no param_element_size any more"):
        register()


def test_transformers_may_be_imported_first():
    """And without us our checkpoints fail loudly, by the name and shape of their weights."""
    out = run_python(
        """
        import tempfile, torch, transformers
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2)
        dense, packed = tempfile.mkdtemp(), tempfile.mkdtemp()
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(dense)
        import qlora_native as qn
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=qn.QLoRANativeConfig())
        model.save_pretrained(packed)
        print(type(AutoModelForCausalLM.from_pretrained(packed).model.layers[0].mlp.up_proj))
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as mapping
        mapping.pop("qlora_native")
        try:
            AutoModelForCausalLM.from_pretrained(packed)
        except RuntimeError as error:
            print(type(error).__name__)
        """
    )
    assert out.splitlines() == ["<class 'qlora_native.nn.linear.Linear4bit'>", "RuntimeError"]


@pytest.mark.parametrize("installed", [True, False])
def test_paged_optimizers_stand_in_for_a_library_that_is_not_there(monkeypatch, installed):
    from importlib import util

    table = pytest.importorskip("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
    before = dict(table)
    monkeypatch.setattr(util, "find_spec", lambda name: object() if installed else None)
    try:
        from qlora_native.hf.optimizers import stand_in_for_bitsandbytes

        stand_in_for_bitsandbytes()
        assert (table["paged_adamw_8bit"] is before["paged_adamw_8bit"]) == installed
    finally:
        table.clear()
        table.update(before)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_imports_no_library():
    loaded = run_python(
        """
        import sys, qlora_native
        print([n for n in ("transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
               if n in sys.modules])
        """
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("name", qlora_native.hf.__all__)
def test_any_name_may_be_the_first_that_is_asked_for(name):
    library = "peft" if name in ("LoftqReport", "init_loftq") else "transformers"
    pytest.importorskip(library)
    run_python(
        f"""
        import warnings
        warnings.filterwarnings("error", message="qlora_native cannot extend")
        import qlora_native as qn
        qn.hf.{name}
        import {library}
        """
    )
