"""Records as text for people: milliseconds, mebibytes and aligned columns, nowhere else. A module for each subject."""

from __future__ import annotations

from edgeprune.core.describe.artifact import describe_artifact as describe_artifact
from edgeprune.core.describe.artifact import describe_cross_check as describe_cross_check
from edgeprune.core.describe.artifact import describe_inspection as describe_inspection
from edgeprune.core.describe.board import describe_advice as describe_advice
from edgeprune.core.describe.board import describe_facts as describe_facts
from edgeprune.core.describe.board import describe_measured as describe_measured
from edgeprune.core.describe.board import describe_targets as describe_targets
from edgeprune.core.describe.changes import describe_gates as describe_gates
from edgeprune.core.describe.changes import describe_pivoted as describe_pivoted
from edgeprune.core.describe.changes import describe_sparsity as describe_sparsity
from edgeprune.core.describe.comparison import comparison_rows as comparison_rows
from edgeprune.core.describe.comparison import describe_comparison as describe_comparison
from edgeprune.core.describe.graph import describe_graph as describe_graph
from edgeprune.core.describe.graph import prunable_macs as prunable_macs
from edgeprune.core.describe.graph import shares as shares
from edgeprune.core.describe.plan import describe_plan as describe_plan
from edgeprune.core.describe.plan import describe_plans as describe_plans
from edgeprune.core.describe.plan import describe_profile as describe_profile
from edgeprune.core.describe.run import describe_distribution as describe_distribution
from edgeprune.core.describe.run import summary as summary
from edgeprune.core.describe.text import UNKNOWN as UNKNOWN
from edgeprune.core.describe.text import interval as interval
from edgeprune.core.describe.text import short_number as short_number
from edgeprune.core.describe.text import table as table
