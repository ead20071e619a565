"""Slides and images of every kind, written for the tests: known colours at known places."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def quadrants(width: int = 512, height: int = 512) -> np.ndarray:
    """Return a picture whose quarters are red, green, blue and grey."""
    picture = np.empty((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    picture[:top, :left], picture[:top, left:] = (200, 40, 40), (40, 180, 60)
    picture[top:, :left], picture[top:, left:] = (50, 60, 190), (128, 128, 128)
    return picture


def textured(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Return smooth coloured noise: any shift or change of scale shows."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_pyramid(
    path: Path, picture: np.ndarray, *, num_levels: int = 3, kind: str = "pages", **options
) -> Path:
    """Write a tiled pyramid: reduced pages, SubIFDs, unmarked pages, or OME-TIFF."""
    ome = kind == "ome"
    options = {"tile": (128, 128), "photometric": "rgb", **options}
    options.setdefault("metadata", {"axes": "YXS"} if ome else None)
    level_options = {key: value for key, value in options.items() if key not in ("metadata", "description")}
    levels = [picture]
    for _ in range(num_levels - 1):
        levels.append(np.asarray(Image.fromarray(levels[-1]).reduce(2)))
    with tifffile.TiffWriter(path, ome=ome) as tiff:
        in_sub_ifds = kind in ("subifds", "ome")
        tiff.write(levels[0], subifds=num_levels - 1 if in_sub_ifds else None, **options)
        for level in levels[1:]:
            tiff.write(level, subfiletype=0 if kind == "unmarked" else 1, metadata=None, **level_options)
    return path


def write_aperio(
    path: Path, picture: np.ndarray, fields: str = "AppMag = 20|MPP = 0.5000", **options
) -> Path:
    """Write what OpenSlide takes for an Aperio slide."""
    height, width = picture.shape[:2]
    description = (
        f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90"
    )
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", **options}
    tifffile.imwrite(path, picture, metadata=None, description=f"{description}|{fields}", **options)
    return path


def write_dicom(
    folder: Path, picture: np.ndarray, *, mpp: float = 0.5, series: str = "1.2.3.4", name: str = "level0"
):
    """Write one level of a DICOM whole-slide image with uncompressed frames of 128 x 128."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

    height, width = picture.shape[:2]
    side = 128
    padded = np.pad(picture, ((0, -height % side), (0, -width % side), (0, 0)), constant_values=255)
    frames = [
        padded[y : y + side, x : x + side].tobytes()
        for y in range(0, padded.shape[0], side)
        for x in range(0, padded.shape[1], side)
    ]

    def item(**values):
        dataset = Dataset()
        for key, value in values.items():
            setattr(dataset, key, value)
        return dataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    code = item(CodeValue="T-D0050", CodingSchemeDesignator="SRT", CodeMeaning="Tissue")
    slide = item(
        file_meta=meta,
        SOPClassUID=VLWholeSlideMicroscopyImageStorage,
        SOPInstanceUID=meta.MediaStorageSOPInstanceUID,
        StudyInstanceUID="1.2.3",
        SeriesInstanceUID=series,
        FrameOfReferenceUID="1.2.3.5",
        ContainerIdentifier="glass",
        Modality="SM",
        Manufacturer="drawn",
        ImageType=["DERIVED", "PRIMARY", "VOLUME", "NONE"],
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
        Rows=side,
        Columns=side,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        NumberOfFrames=len(frames),
        TotalPixelMatrixColumns=width,
        TotalPixelMatrixRows=height,
        TotalPixelMatrixFocalPlanes=1,
        NumberOfOpticalPaths=1,
        DimensionOrganizationType="TILED_FULL",
        ImagedVolumeWidth=width * mpp / 1000,
        ImagedVolumeHeight=height * mpp / 1000,
        ImagedVolumeDepth=0.001,
        ImageOrientationSlide=[0, 1, 0, 1, 0, 0],
        FocusMethod="AUTO",
        ExtendedDepthOfField="NO",
        BurnedInAnnotation="NO",
        SpecimenLabelInImage="NO",
        LossyImageCompression="00",
        VolumetricProperties="VOLUME",
        TotalPixelMatrixOriginSequence=[
            item(XOffsetInSlideCoordinateSystem=0, YOffsetInSlideCoordinateSystem=0)
        ],
        OpticalPathSequence=[item(OpticalPathIdentifier="0", IlluminationTypeCodeSequence=[code])],
        SharedFunctionalGroupsSequence=[
            item(
                PixelMeasuresSequence=[
                    item(
                        PixelSpacing=[mpp / 1000, mpp / 1000],
                        SliceThickness=0.001,
                        SpacingBetweenSlices=0.001,
                    )
                ]
            )
        ],
        PixelData=b"".join(frames),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(folder / f"{name}.dcm", slide, enforce_file_format=True)
    return folder
