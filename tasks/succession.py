"""Who is champion next: a challenger's front against that of the router in service, and against others at once."""

from pathlib import Path as FilePath
from tempfile import TemporaryDirectory

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from quee_core.champion import ServedFront, contest
from quee_core.errors import DamagedTableError
from quee_core.redaction import without_secrets
from tasks.mlflow_server import passes
from tasks.registry import PREFIX, RouterRegistry, standing_of
from tasks.router_package import FRONT_ARTIFACT


def judge(registry: RouterRegistry, uri: str, dataset: str, number: str, own: ServedFront) -> tuple[str, bool]:
    """Put version `number`, whose front is `own`, in service if that is due; how it went, and if that is the last word.

    It is not where the champion's front cannot be read: a rerun may find it mended.
    """
    overrule = f"`quee champion promote {dataset} {number}`"
    while True:
        champion = registry.champion(dataset)
        if champion is None:
            how, verdict = "first", "the first router of its data set"
        elif champion.version == number:  # a killed process had come so far
            verdict = f"champion since {champion.since}: {champion.how}"
            break
        else:
            theirs = _front(registry, uri, dataset, champion.version)
            if isinstance(theirs, str):
                return f"not judged: the front of version {champion.version} {theirs}; {overrule} decides", False
            outcome = contest(own, theirs)
            how = f"better than version {champion.version}"
            verdict = f"{how}: {outcome.reason}"
            if not outcome.better:
                return f"not clearly {verdict}; {overrule} overrules this", True
        if registry.promote(dataset, number, how, standing_of(champion)):
            break  # else another sweep was faster, and its router is the one to beat
    return verdict + _settled(registry, uri, dataset, number, own), True


def _settled(registry: RouterRegistry, uri: str, dataset: str, number: str, own: ServedFront) -> str:
    """Between versions that were promoted at the same time the best counts, and of equal ones the first.

    All of them come to the same end, whoever moved the alias last. Returns what is to be added to the verdict.
    """
    fronts = {number: own}
    for rival in registry.rivals(dataset, number):
        if isinstance(theirs := _front(registry, uri, dataset, rival), ServedFront):
            fronts[rival] = theirs
    best, *others = sorted(fronts, key=int)
    for other in others:
        if contest(fronts[other], fronts[best]).better:
            best = other
    champion = registry.champion(dataset)
    if champion is not None and champion.version in fronts and champion.version != best:
        how = f"promoted at the same time as version {champion.version}, which is not clearly better"
        registry.promote(dataset, best, how)
    if best == number:
        return ""
    return f"; but version {best}, promoted at the same time, stays: {contest(own, fronts[best]).reason}"


def _front(registry: RouterRegistry, uri: str, dataset: str, number: str) -> ServedFront | str:
    """The per-image front that lies beside a registered router, or why it cannot be read."""
    version = registry.client.get_model_version(PREFIX + dataset, number)
    try:
        with TemporaryDirectory() as scratch:
            place = f"{str(version.source).rstrip('/')}/{FRONT_ARTIFACT}"
            found = download_artifacts(artifact_uri=place, dst_path=scratch, tracking_uri=uri)
            return ServedFront.from_bytes(FilePath(found).read_bytes())
    except (MlflowException, BotoCoreError, ClientError, Boto3Error, OSError, DamagedTableError) as error:
        if passes(error):
            raise
        return without_secrets(f"cannot be read ({' '.join(str(error).split())[:200]})")
