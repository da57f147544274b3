"""`python -m infra.bucket NAME`: make a bucket on the S3 server of the surroundings, unless it is there."""

import sys

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def make_bucket(name: str) -> None:
    """Make the bucket `name`; the endpoint and the keys are those of the usual variables and profiles."""
    client = boto3.client("s3")
    try:
        client.create_bucket(Bucket=name)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou",):
            raise


def main() -> None:
    """Make the bucket that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m infra.bucket NAME")
    try:
        make_bucket(sys.argv[1])
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"error: bucket {sys.argv[1]}: {error}")


if __name__ == "__main__":
    main()
