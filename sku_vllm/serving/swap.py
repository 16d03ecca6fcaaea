"""Worker extension."""


class SkuWorkerExtension:
    pass
