"""Files and folders on local disks and in object stores, by URL."""

from internlm.utils.storage.failures import full_disk, storage_failure
from internlm.utils.storage.path import StoragePath, storage_path
from internlm.utils.storage.store import StoredFile

__all__ = ["StoragePath", "StoredFile", "full_disk", "storage_failure", "storage_path"]
