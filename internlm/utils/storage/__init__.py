"""Files and folders on local disks and in object stores, by URL."""

from internlm.utils.storage.path import StoragePath, storage_path

__all__ = ["StoragePath", "storage_path"]
