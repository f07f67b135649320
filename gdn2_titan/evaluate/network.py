"""Whether the data sets of others can be fetched here at all."""

import os
import urllib.error
import urllib.request

__all__ = ["leave_the_hub_alone_where_there_is_none"]

HUB = "https://huggingface.co"
SECONDS = 5


def leave_the_hub_alone_where_there_is_none() -> None:
    """Tell the libraries that there is no network, where the hub does not answer within SECONDS.

    They take data that lie on this machine then, and do not try for minutes to fetch others. They read the word when
    they are imported, so this comes before.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", HUB), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
