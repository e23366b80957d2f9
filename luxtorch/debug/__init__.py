"""Look at values inside of compiled functions, and check them: what runs each time that the program does."""

from ._callback import breakpoint as breakpoint
from ._callback import callback as callback
from ._print import CheckError as CheckError
from ._print import check as check
from ._print import print as print
