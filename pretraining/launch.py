"""The processes of a pretraining: on one CPU or GPU, on several of one node, or as torchrun and SLURM started them."""

from __future__ import annotations

import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy

from nnunet_fratmae.base.command import UserError


def make_fabric(device: str, gpus: int, nodes: int, weights_rest: bool) -> Fabric:
    """Launched Fabric on `gpus` GPUs (or CPU processes) of each of `nodes` nodes; torchrun and SLURM are found.

    `weights_rest`: as `Method.rests`.

    Raises:
        UserError: they started another number of processes, or nobody did on further nodes.
    """
    _check_launcher(gpus, nodes)
    is_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    ddp = DDPStrategy(find_unused_parameters=weights_rest, broadcast_buffers=False)
    try:
        fabric = Fabric(
            accelerator=device, devices=gpus, num_nodes=nodes, strategy=ddp if gpus * nodes > 1 else "auto",
            precision="bf16-mixed" if is_bf16 else "32-true",
        )  # fmt: skip
        fabric.launch()
    except (ValueError, RuntimeError) as error:  # such as tasks of srun that do not go with these numbers
        raise UserError(f"-num_gpus {gpus} on -num_nodes {nodes}: {' '.join(str(error).split())}") from None
    return fabric


def _check_launcher(gpus: int, nodes: int) -> None:
    """Processes of torchrun and srun that know nothing of each other would be as many runs in one folder."""
    if TorchElasticEnvironment.detect():
        launcher, started = "torchrun", TorchElasticEnvironment().world_size()
    elif SLURMEnvironment.detect():  # a batch script without srun is one process
        launcher, started = "SLURM", int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    elif nodes > 1 and not {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():
        raise UserError(f"-num_nodes {nodes}: nobody started the processes of the other nodes; start this command with "
                        "srun or torchrun on all of them")  # fmt: skip
    else:
        return
    if started != gpus * nodes:
        raise UserError(f"-num_gpus {gpus} on -num_nodes {nodes}: {launcher} started {started} processes; start one "
                        "for each GPU (srun --ntasks-per-node, torchrun --nproc_per_node)")  # fmt: skip
