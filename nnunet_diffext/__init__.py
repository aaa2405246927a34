"""Published segmentation methods as plug-ins for an unmodified nnU-Net v2.

Importing this package costs nothing: no torch, no nnU-Net. nnU-Net finds the trainers through the directory that
``nnunet_diffext trainer_dir`` prints (environment variable ``nnUNet_extTrainer``).
"""

__version__ = "0.1.0"
