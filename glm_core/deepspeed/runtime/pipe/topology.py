"""Places ranks in a grid of named axes and makes the process groups along them; the grid can serve
as an mpu. Ranks are numbered row-major: the last axis runs fastest."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from glm_core.errors import ConfigError


class ProcessTopology:
    """A grid of ranks with named axes."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        """For example ProcessTopology(["pipe", "data"], [2, 4]), which has 8 ranks. Raises
        ConfigError."""
        if len(axes) != len(dims) or min(dims, default=1) < 1:
            raise ConfigError(
                f"topology: axes {axes} with sizes {dims}; give one positive size each"
            )
        self.axes, self.dims = list(axes), list(dims)
        make: Any = collections.namedtuple  # the axes are data
        self.ProcessCoord = make("ProcessCoord", self.axes)
        places = itertools.product(*(range(d) for d in self.dims))
        self.mapping = {self.ProcessCoord(*place): rank for rank, place in enumerate(places)}
        self._coords = list(self.mapping)

    def get_rank(self, **coord: int) -> int:
        """Returns the rank at a place; every axis must be given. Raises ConfigError."""
        if set(coord) != set(self.axes):
            raise ConfigError(f"get_rank: axes {sorted(coord)}; give all of {self.axes}")
        try:
            return self.mapping[self.ProcessCoord(**coord)]
        except KeyError:
            raise ConfigError(f"get_rank: {coord} is outside {self.axes} x {self.dims}") from None

    def get_coord(self, rank: int) -> Any:
        """Returns the place of a rank, with `.pipe`, `.data`, ... Raises ConfigError."""
        if not 0 <= rank < len(self._coords):
            raise ConfigError(f"get_coord: rank {rank}; there are {len(self._coords)} ranks")
        return self._coords[rank]

    def get_axis_names(self) -> list[str]:
        """Returns the axes, the slowest first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Returns the number of ranks along an axis; 0 where there is no such axis."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Sequence[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """Returns the place as part of a file name, such as `model_01`."""
        place = self.get_coord(rank)._asdict()
        return outer_sep.join(
            f"{axis}{inner_sep}{at:02d}" for axis, at in place.items() if axis not in omit_axes
        )

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Returns the lines along an axis, each a list of ranks; [] where there is no such axis."""
        if axis not in self.axes:
            return []
        lines: dict[tuple[int, ...], list[int]] = {}
        index = self.axes.index(axis)
        for place, rank in self.mapping.items():
            lines.setdefault(tuple(place[:index] + place[index + 1 :]), []).append(rank)
        return list(lines.values())

    def filter_match(self, **wanted: int) -> list[int]:
        """Returns the ranks whose place agrees with all of `wanted`."""
        return [
            rank
            for place, rank in self.mapping.items()
            if all(getattr(place, axis) == at for axis, at in wanted.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """Returns the ranks whose place on `axis` is idx."""
        return self.filter_match(**{axis: idx})

    def world_size(self) -> int:
        """Returns the number of ranks in the grid."""
        return len(self.mapping)

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages of data-parallel replicas. Replicas of a stage have neighbouring ranks."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline stages of data-parallel replicas of tensor-parallel groups. A group has neighbouring
    ranks."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])


class PipelineParallelGrid:
    """This process's place in a topology and its process groups, with an mpu's methods. As in
    DeepSpeed, "model parallel" means all of one replica, its stages and tensor slices; "slice"
    means tensor parallel alone."""

    def __init__(self, topology: ProcessTopology, process_group: Any = None) -> None:
        """process_group has no effect: the grid is all ranks. Raises ConfigError where the topology
        has another number of ranks than the job."""
        if topology.world_size() != dist.get_world_size():
            raise ConfigError(
                f"topology: {topology.axes} x {topology.dims} has {topology.world_size()} ranks, "
                f"the job {dist.get_world_size()}; make them equal"
            )
        self._topo = topology
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()
        place = topology.get_coord(self.global_rank)
        self.stage_id: int = place.pipe
        self.data_parallel_id: int = getattr(place, "data", 0)
        self.data_parallel_size = max(topology.get_dim("data"), 1)
        self.pipe_parallel_size = max(topology.get_dim("pipe"), 1)
        self.model_parallel_size = max(topology.get_dim("model"), 1)
        self.slice_parallel_size = self.model_parallel_size
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1
        self.dp_group, self.dp_proc_group = self._along("data")
        self.pp_group, self.pp_proc_group = self._along("pipe")
        self.slice_group, self.slice_proc_group = self._along("model")
        replicas = range(self.data_parallel_size)
        whole = "data" in topology.axes
        models = [topology.get_axis_list("data", d) for d in replicas] if whole else []
        own, self.ds_model_proc_group = make_groups(models or [list(range(self.world_size))])
        self.ds_model_rank, self.ds_model_world_size = own.index(self.global_rank), len(own)

    def _along(self, axis: str) -> tuple[list[int], dist.ProcessGroup]:
        alone = [[rank] for rank in range(self.world_size)]
        return make_groups(self._topo.get_axis_comm_lists(axis) or alone)

    def stage_to_global(self, stage_id: int, **place: int) -> int:
        """Returns the rank at another stage, at this process's other coordinates or those of
        `place`."""
        here = self._topo.get_coord(self.global_rank)
        return self._topo.get_rank(**here._replace(pipe=stage_id, **place)._asdict())

    def topology(self) -> ProcessTopology:
        return self._topo

    # --- as an mpu ---

    def get_global_rank(self) -> int:
        return self.global_rank

    def get_stage_id(self) -> int:
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        """Returns the number of the replica that this process is in."""
        return self.data_parallel_id

    get_pipe_parallel_rank = get_pipeline_model_parallel_rank = get_stage_id
    get_data_parallel_rank = get_data_parallel_id

    def get_pipe_parallel_world_size(self) -> int:
        """Returns the number of stages."""
        return self.pipe_parallel_size

    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    def get_pipe_parallel_group(self) -> dist.ProcessGroup:
        """Returns the group of this replica's stages (at the same slice)."""
        return self.pp_proc_group

    get_pipeline_model_parallel_group = get_pipe_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """Returns the number of replicas."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Returns the group of all replicas' ranks at this stage and slice."""
        return self.dp_proc_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Returns the ranks of the data-parallel group."""
        return self.dp_group

    def get_model_parallel_rank(self) -> int:
        """Returns this process's number in its replica."""
        return self.ds_model_rank

    def get_model_parallel_world_size(self) -> int:
        """Returns the number of ranks of a replica."""
        return self.ds_model_world_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Returns the group of this replica's ranks."""
        return self.ds_model_proc_group

    def get_slice_parallel_rank(self) -> int:
        """Returns the tensor-parallel rank."""
        return self.slice_group.index(self.global_rank)

    get_tensor_model_parallel_rank = get_slice_parallel_rank

    def get_slice_parallel_world_size(self) -> int:
        """Returns the number of tensor-parallel ranks."""
        return self.slice_parallel_size

    get_tensor_model_parallel_world_size = get_slice_parallel_world_size

    def get_slice_parallel_group(self) -> dist.ProcessGroup:
        """Returns the tensor-parallel group."""
        return self.slice_proc_group

    get_tensor_model_parallel_group = get_slice_parallel_group


def make_groups(lists: Sequence[Sequence[int]]) -> tuple[list[int], dist.ProcessGroup]:
    """Makes a process group of each list, on all ranks together. Returns this rank's list and its
    group; for a rank that is in no list the list is empty and the group means nothing."""
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in lists])
    return next((list(ranks) for ranks in lists if dist.get_rank() in ranks), []), own
