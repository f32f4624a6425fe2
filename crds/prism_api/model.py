"""PrismModel: an elastic artifact and its operating points with measured quality. Source of its CRD."""

from typing import Annotated

from pydantic import ConfigDict, Field

from prism_api.base import IMMUTABLE, Digest, Document, Generation, ReplicaCount, named_list, rules
from prism_api.conditions import Condition
from prism_api.points import Ladder, OperatingPoint

ArtifactPath = Annotated[
    str,
    Field(
        pattern=r"^/[-A-Za-z0-9._/]*$",
        max_length=256,
        json_schema_extra=rules(("!self.contains('..')", "path must not contain '..'; name the folder from the root")),
    ),
]


class ImageSource(Document):
    """An OCI image, for example made by `COPY artifact/ /` on an empty base."""

    reference: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="OCI image that holds the artifact; mounted read-only as an image volume."
    )
    path: ArtifactPath = Field("/", description="Folder of the artifact inside the image.")


class ClaimSource(Document):
    """A volume that already holds the artifact."""

    claim_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        description="PersistentVolumeClaim that holds the artifact; mounted read-only."
    )
    path: ArtifactPath = Field("/", description="Folder of the artifact inside the volume.")


class Source(Document):
    """Where pods find the artifact: exactly one member."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.image) != has(self.persistentVolumeClaim)",
                "source must have exactly one of `image` and `persistentVolumeClaim`",
            ),
            (IMMUTABLE, "source is immutable; create a new PrismModel for a new artifact"),
        )
    )
    image: ImageSource | None = Field(None, description="The artifact as an OCI image.")
    persistent_volume_claim: ClaimSource | None = Field(None, description="The artifact on a volume.")


ImmutableDigest = Annotated[
    Digest,
    Field(json_schema_extra=rules((IMMUTABLE, "digest is immutable; create a new PrismModel for a new artifact"))),
]


class PrismModelSpec(Document):
    """An artifact made by `prism-runtime refactor`, described for the operator."""

    source: Source = Field(description="Where pods find the artifact; immutable.")
    digest: ImmutableDigest = Field(
        description="sha256 of the artifact's prism_manifest.json; a pod that loaded another gets no directive."
    )
    served_name: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        description="Model name in the OpenAI API."
    )
    operating_points: list[OperatingPoint] = Field(
        min_length=1,
        max_length=32,
        description="Operating points with measured quality, copied from the artifact's manifest.",
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            **rules(
                (
                    "self.exists_one(p, p.name == 'full' && p.budgetPermille == 1000)",
                    "operatingPoints must contain `full` with budgetPermille 1000",
                ),
                (
                    "self.all(p, self.exists_one(q, q.budgetPermille == p.budgetPermille))",
                    "operatingPoints must have distinct budgetPermille values",
                ),
            ),
        },
    )

    @property
    def ladder(self) -> Ladder:
        return Ladder(self.operating_points)


class PrismModelStatus(Document):
    """What the operator found out about the model."""

    observed_generation: Generation | None = Field(
        None, description="Generation of the spec that this status describes."
    )
    services_using: ReplicaCount | None = Field(None, description="PrismServices that refer to this model.")
    conditions: list[Condition] | None = named_list("Conditions.", key="type", default=None, max_length=16)
