from rankkv._version import __version__ as __version__
from rankkv.budget_allocation import BudgetAllocation as BudgetAllocation
from rankkv.budget_allocation import BudgetAllocator as BudgetAllocator
from rankkv.cache import RankKVCache as RankKVCache
from rankkv.cache import compress as compress
from rankkv.calibration import calibrate as calibrate
from rankkv.calibration import compute_query_filters as compute_query_filters
from rankkv.calibration import save_query_filters as save_query_filters
from rankkv.config import RankKVConfig as RankKVConfig
from rankkv.models import load_model as load_model
from rankkv.models import load_texts as load_texts
from rankkv.pipeline import RankKVAnalyzer as RankKVAnalyzer
from rankkv.pipeline import RankKVResult as RankKVResult
from rankkv.pipeline import quick_analyze as quick_analyze
from rankkv.profile import RankProfile as RankProfile
from rankkv.rank_analysis import RankAnalysis as RankAnalysis
from rankkv.rank_analysis import analyze_attention_ranks as analyze_attention_ranks
from rankkv.rank_analysis import compute_effective_rank as compute_effective_rank

_HOME_OF: dict[str, str]
