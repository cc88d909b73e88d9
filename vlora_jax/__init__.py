"""Parameter-efficient Transformers in JAX and Flax: Vertical LoRA and the adapters of the literature."""

from vlora_jax.adapters.adalora import AdaLoRA
from vlora_jax.adapters.adapter import Adapter, combine, count, partition, stack_adapters, trainable_mask
from vlora_jax.adapters.arithmetic import add, average, interpolate, negate, scale, weighted_sum
from vlora_jax.adapters.bilora import BiLoRA
from vlora_jax.adapters.bind import apply, bind
from vlora_jax.adapters.bitfit import BitFit
from vlora_jax.adapters.consensus import dare, ties
from vlora_jax.adapters.deep_lora import DeepLoRA
from vlora_jax.adapters.delora import DeLoRA
from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.adapters.dora import DoRA
from vlora_jax.adapters.flylora import FlyLoRA
from vlora_jax.adapters.fourierft import FourierFT
from vlora_jax.adapters.hira import HiRA
from vlora_jax.adapters.ia3 import IA3
from vlora_jax.adapters.init import init
from vlora_jax.adapters.lamda import LaMDA
from vlora_jax.adapters.ln_tuning import LNTuning
from vlora_jax.adapters.loha import LoHa
from vlora_jax.adapters.lokr import LoKr
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.lora_xs import LoRAXS
from vlora_jax.adapters.lorta import LoRTA
from vlora_jax.adapters.merge import merge
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.miss import MiSS
from vlora_jax.adapters.olora import OLoRA
from vlora_jax.adapters.pissa import PiSSA
from vlora_jax.adapters.quantize import quantize
from vlora_jax.adapters.randlora import RandLoRA
from vlora_jax.adapters.sara import SARA, MoSARA
from vlora_jax.adapters.selective import Selective
from vlora_jax.adapters.sine_lora import SineLoRA
from vlora_jax.adapters.sites import Site, find_sites, select, split
from vlora_jax.adapters.spiel import SpIEL
from vlora_jax.adapters.svfit import SVFit
from vlora_jax.adapters.tied_lora import TiedLoRA
from vlora_jax.adapters.token_rows import TokenRows
from vlora_jax.adapters.vblora import VBLoRA
from vlora_jax.adapters.vera import VeRA
from vlora_jax.generation.generate import generate
from vlora_jax.generation.sampling import Sampling
from vlora_jax.hub.load import load, load_model
from vlora_jax.hub.peft import as_lora, read_peft, write_peft
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.convert import convert, residuals
from vlora_jax.vertical.expand import expand

__all__ = [
    "IA3",
    "SARA",
    "AdaLoRA",
    "Adapter",
    "BiLoRA",
    "BitFit",
    "DeLoRA",
    "DeepLoRA",
    "Diagonal",
    "DoRA",
    "FlyLoRA",
    "FourierFT",
    "HiRA",
    "LNTuning",
    "LaMDA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAXS",
    "LoRTA",
    "Method",
    "MiSS",
    "MoSARA",
    "OLoRA",
    "PiSSA",
    "RandLoRA",
    "SVFit",
    "Sampling",
    "Selective",
    "SineLoRA",
    "Site",
    "SpIEL",
    "Stack",
    "TiedLoRA",
    "TokenRows",
    "VBLoRA",
    "VeRA",
    "Vertical",
    "add",
    "apply",
    "as_lora",
    "average",
    "bind",
    "combine",
    "convert",
    "count",
    "dare",
    "expand",
    "find_sites",
    "generate",
    "init",
    "interpolate",
    "load",
    "load_model",
    "merge",
    "negate",
    "partition",
    "quantize",
    "read_peft",
    "residuals",
    "scale",
    "select",
    "split",
    "stack_adapters",
    "ties",
    "trainable_mask",
    "weighted_sum",
    "write_peft",
]
