"""Every record that passes between stages or is written to disk. Read this first.

Plain values in frozen dataclasses. SI base units stand in the field name (`_s _j _w _bytes _hz _c`).
`None` means "not measured", never 0. How they are written and read back: `core/store.py`.

A *unit* is one removable index of a group, a *group* is a set of channels planned together, its
*width* the number of units kept. Sizes that depend on widths are `Extent`s, so that shapes, MACs,
bytes and kernel costs follow from widths without touching the model.
"""

from __future__ import annotations

from edgeprune.core.records.arrays import FloatArray as FloatArray
from edgeprune.core.records.arrays import IntArray as IntArray
from edgeprune.core.records.arrays import Widths as Widths
from edgeprune.core.records.board import AVX512 as AVX512
from edgeprune.core.records.board import BoardFacts as BoardFacts
from edgeprune.core.records.board import Conditions as Conditions
from edgeprune.core.records.board import KernelTime as KernelTime
from edgeprune.core.records.board import PowerSamples as PowerSamples
from edgeprune.core.records.board import Samples as Samples
from edgeprune.core.records.board import Step as Step
from edgeprune.core.records.board import StepResult as StepResult
from edgeprune.core.records.board import Target as Target
from edgeprune.core.records.comparison import Comparison as Comparison
from edgeprune.core.records.comparison import Outcome as Outcome
from edgeprune.core.records.comparison import most_accurate as most_accurate
from edgeprune.core.records.costs import Budget as Budget
from edgeprune.core.records.costs import Cost as Cost
from edgeprune.core.records.costs import EnergyModel as EnergyModel
from edgeprune.core.records.costs import Fold as Fold
from edgeprune.core.records.costs import HeldOutError as HeldOutError
from edgeprune.core.records.costs import Kernel as Kernel
from edgeprune.core.records.costs import Measurement as Measurement
from edgeprune.core.records.costs import MemoryModel as MemoryModel
from edgeprune.core.records.costs import Profile as Profile
from edgeprune.core.records.costs import Quantity as Quantity
from edgeprune.core.records.costs import Statistic as Statistic
from edgeprune.core.records.costs import Table as Table
from edgeprune.core.records.findings import Advice as Advice
from edgeprune.core.records.findings import CrossCheck as CrossCheck
from edgeprune.core.records.findings import Inspection as Inspection
from edgeprune.core.records.findings import KernelAdvice as KernelAdvice
from edgeprune.core.records.findings import Measured as Measured
from edgeprune.core.records.findings import Operation as Operation
from edgeprune.core.records.findings import OperationError as OperationError
from edgeprune.core.records.findings import PrecisionChoice as PrecisionChoice
from edgeprune.core.records.findings import PrecisionTrial as PrecisionTrial
from edgeprune.core.records.findings import Timing as Timing
from edgeprune.core.records.gating import Distribution as Distribution
from edgeprune.core.records.gating import Gate as Gate
from edgeprune.core.records.gating import Gated as Gated
from edgeprune.core.records.model import FLOAT32 as FLOAT32
from edgeprune.core.records.model import Branch as Branch
from edgeprune.core.records.model import Constant as Constant
from edgeprune.core.records.model import Extent as Extent
from edgeprune.core.records.model import Graph as Graph
from edgeprune.core.records.model import Group as Group
from edgeprune.core.records.model import Member as Member
from edgeprune.core.records.model import ModelSpec as ModelSpec
from edgeprune.core.records.model import Node as Node
from edgeprune.core.records.model import Parameter as Parameter
from edgeprune.core.records.model import Precision as Precision
from edgeprune.core.records.model import Rewritten as Rewritten
from edgeprune.core.records.model import WidthRules as WidthRules
from edgeprune.core.records.pivot import LayerBlocks as LayerBlocks
from edgeprune.core.records.pivot import Pivoted as Pivoted
from edgeprune.core.records.plan import Bracket as Bracket
from edgeprune.core.records.plan import CurveTrial as CurveTrial
from edgeprune.core.records.plan import Heat as Heat
from edgeprune.core.records.plan import Importance as Importance
from edgeprune.core.records.plan import LossCurve as LossCurve
from edgeprune.core.records.plan import Plan as Plan
from edgeprune.core.records.plan import PlanRound as PlanRound
from edgeprune.core.records.plan import SolverResult as SolverResult
from edgeprune.core.records.recovery import RecoverResult as RecoverResult
from edgeprune.core.records.recovery import RecoverSettings as RecoverSettings
from edgeprune.core.records.report import Accuracy as Accuracy
from edgeprune.core.records.report import Artifact as Artifact
from edgeprune.core.records.report import Bundle as Bundle
from edgeprune.core.records.report import Check as Check
from edgeprune.core.records.report import NumericError as NumericError
from edgeprune.core.records.report import Report as Report
from edgeprune.core.records.report import TensorInfo as TensorInfo
from edgeprune.core.records.sparsity import LayerSparsity as LayerSparsity
from edgeprune.core.records.sparsity import Sparsity as Sparsity
