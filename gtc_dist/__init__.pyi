from gtc_dist.api import Run as Run
from gtc_dist.api import prepare as prepare
from gtc_dist.api import train as train

__version__: str
