"""The check of URLs in flags and arms. Open this file to change which URLs are accepted."""

from urllib.parse import urlsplit


def http_url(text: str) -> bool:
    """Whether a text is an http or https URL with a host and, if it has a port, a port from 1 to 65535."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
