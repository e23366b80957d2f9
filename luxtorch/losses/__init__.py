"""Losses: immutable values that compare predictions with targets, and serve as training objectives."""

from ._binary import BinaryCrossEntropyLoss as BinaryCrossEntropyLoss
from ._binary import BinaryFocalLoss as BinaryFocalLoss
from ._binary import DiceCoeffLoss as DiceCoeffLoss
from ._classification import CrossEntropyLoss as CrossEntropyLoss
from ._classification import FocalLoss as FocalLoss
from ._classification import KLDivergenceLoss as KLDivergenceLoss
from ._classification import NLLLoss as NLLLoss
from ._ctc import CTCLoss as CTCLoss
from ._loss import Aggregation as Aggregation
from ._loss import GenericLossFunction as GenericLossFunction
from ._loss import Loss as Loss
from ._margin import CosineEmbeddingLoss as CosineEmbeddingLoss
from ._margin import HingeLoss as HingeLoss
from ._margin import SiameseContrastiveLoss as SiameseContrastiveLoss
from ._margin import SquaredHingeLoss as SquaredHingeLoss
from ._margin import TripletMarginLoss as TripletMarginLoss
from ._regression import HuberLoss as HuberLoss
from ._regression import L1Loss as L1Loss
from ._regression import L2Loss as L2Loss
from ._regression import MAELoss as MAELoss
from ._regression import MSELoss as MSELoss
from ._regression import MSLELoss as MSLELoss
from ._regression import PoissonLoss as PoissonLoss
from ._regression import SmoothL1Loss as SmoothL1Loss
