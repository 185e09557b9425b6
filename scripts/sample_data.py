"""Write the sample task: a customer's message goes in, one JSON object with five fixed keys comes out.

Everything in a row is put together from the lists below, so the rows are ours and free to use. No item of val or test
occurs in train, and a quarter of their rows ask in a wording that occurs nowhere in train.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command
from scripts.utils.errors import RefusedError
from scripts.utils.files import REPO_ROOT, disk_errors, json_line, write_jsonl

SEED = 20261125
ROWS = {"train": 400, "val": 50, "test": 150}
SYSTEM = "Extract intent, item, quantity, order and urgent as JSON."

# lists are written as text, " | " between entries; {item} becomes "the kettle" or "3 kettles"; {it}, {is} and {has} agree with it
WORDINGS = {
    "train": {
        "refund": "I want my money back for {item} | please refund {item} | can I return {item} and get a refund? | "
        "{item} {is} not what I hoped for, I'd like a refund | how do I get a refund for {item}? | "
        "I sent {item} back and still wait for my money | you charged me twice for {item}, please pay it back | "
        "I'd like to send {item} back for a full refund | give me back what I paid for {item} | "
        "I am not happy with {item} and expect a refund | kindly return the money I spent on {item} | "
        "is it possible to get my money back on {item}? | {item} {is} useless to me, refund me | "
        "when do I get the money for {item} that I returned? | I would like my payment for {item} back | "
        "a refund for {item} would be great | the price of {item} should go back to my card | "
        "sadly {item} {is} a bad buy, I want a refund",
        "exchange": "can I swap {item} for a bigger size? | I'd like to exchange {item} for another colour | "
        "please change {item} for a smaller model | you sent {item} in the wrong colour, can we swap? | "
        "{item} {is} too small, I need a larger size instead | I got {item} in blue but want green instead | "
        "may I trade {item} for a different model? | wrong size! please exchange {item} | "
        "could you replace {item} with the white version? | "
        "I would rather have {item} in red, can you exchange {it}? | "
        "{item} {is} too big, may I swap {it} for a smaller size? | could I get another colour in place of {item}? | "
        "I need {item} in a longer version | the size of {item} is wrong, can I get another? | "
        "is it possible to swap {item} for the newer model? | "
        "{item} {is} too heavy, could I have a lighter version? | not the colour I ordered: please swap {item} | "
        "can I have a bigger version instead of {item}?",
        "delivery": "where {is} {item}? | {item} still {has} not arrived | when will {item} arrive? | "
        "I am still waiting for {item} | the tracking of {item} has not moved for 4 days | "
        "did the courier lose {item}? | {item} should have come last week | any news on the delivery of {item}? | "
        "my parcel with {item} is late | {item} never turned up | when can I expect {item} at my door? | "
        "it's been ten days and {item} {has} not been delivered | {item} did not show up | did you ship {item}? | "
        "I have waited two weeks for {item} | what is the status of my delivery of {item}? | no sign of {item} yet | "
        "the driver never brought {item}",
        "repair": "{item} stopped working | {item} broke after two weeks | {item} will not switch on any more | "
        "can someone fix {item}? | I need a repair for {item} | {item} {has} a crack, can you mend {it}? | "
        "there is a defect in {item} | {item} came damaged, please fix {it} | a part of {item} is broken | "
        "{item} quit working yesterday | {item} {is} making a strange noise, can you repair {it}? | "
        "who can fix the broken switch of {item}? | {item} died after 3 days | {item} keeps switching off | "
        "{item} {has} a broken handle | how do I get {item} fixed? | {item} {is} leaking, please mend {it} | "
        "the button of {item} is stuck, can you repair {it}?",
        "cancel": "please cancel {item} | I don't need {item} any more, please cancel | stop the order for {item} | "
        "I ordered {item} by mistake, please cancel | take {item} off my order | "
        "do not ship {item}, I changed my mind | can I still cancel {item}? | "
        "I no longer want {item}, don't send {it} | forget my order of {item} | "
        "I would like to cancel my purchase of {item} | please stop {item} from being shipped | "
        "remove {item} from my order, I don't want {it} any more | please call off the order of {item} | "
        "{item} {is} not needed, please drop the order | I found {item} cheaper, cancel my order | "
        "don't bother to send {item} | delete {item} from my order | I take back my order of {item}",
    },
    "val": {
        "refund": "{item} {is} a let-down, refund me please | could you pay back the price of {item}?",
        "exchange": "I would prefer {item} in black, can we swap? | {item} {is} too wide, I want a slimmer model",
        "delivery": "how long until {item} gets here? | I have not received {item} yet",
        "repair": "{item} {is} faulty, who can repair {it}? | {item} suddenly died on me",
        "cancel": "kindly cancel my order for {item} | cancel {item} please, I found {it} elsewhere",
    },
    "test": {
        "refund": "{item} let me down, a refund please | how can I get back the money for {item}? | "
        "I'm returning {item}, please refund the price",
        "exchange": "can you exchange {item} for a lighter colour? | "
        "{item} {is} too long, I'd like a shorter model instead | I need a different size in place of {item}",
        "delivery": "{item} did not come on Monday, where {is} {it}? | "
        "how many days until {item} will be delivered? | have you sent {item} yet? nothing has arrived",
        "repair": "the sound of {item} is gone, please repair {it} | {item} fell and broke, can you fix {it}? | "
        "there is something broken inside {item}",
        "cancel": "I have to cancel my order of {item} | please cancel {item} after all | "
        "cancel {item}, I bought {it} in a shop",
    },
}
ITEMS = {
    "train": "kettle | desk lamp | toaster | headset | keyboard | blender | hair dryer | phone case | printer | "
    "webcam | coffee grinder | fan | heater | monitor | camera | travel mug | drill | radio | alarm clock | "
    "vacuum cleaner | mixer | bike light | speaker | tablet | router | charger | power bank | microphone | "
    "rice cooker | sewing machine | projector | electric shaver | garden hose | air pump | step counter | "
    "game console | steam iron | floor lamp | tent | backpack | water filter | pepper mill | dehumidifier | "
    "milk frother | flashlight | car seat | hard drive | juicer | lawn mower | wall clock | thermometer | "
    "baby monitor | drone | office chair | pressure cooker | coffee machine | shower head | bed frame | bath mat | "
    "door lock | car charger | dog bed | cat carrier | egg cooker | fish tank | foot rest | gas grill | "
    "hand blender | ink cartridge | key holder | leaf blower | milk jug | nail gun | oil radiator | paper shredder | "
    "rain jacket | salad spinner | shoe rack | soup pot | tea maker | tool box | tripod | umbrella | violin | "
    "wallet | wine cooler | yoga mat | hammer | ladder | mattress topper | pillow | sofa cover | suitcase | "
    "table fan | towel rail | video recorder | wheelchair | whisk | window blind | candle holder | cupboard | "
    "mirror | helmet | bicycle pump | sleeping bag | hiking pole | rubber boot | bookshelf",
    "val": "letter opener | waffle maker | humidifier | scanner | kitchen scale | doorbell | bread slicer | ice bucket",
    "test": "bread knife | desk fan | bird feeder | cake tin | piano bench | spice rack | roof box | "
    "plant pot | steam mop | bath towel | tennis racket | coat hook | label printer | fog machine | lunch box",
}
NAMES = {
    "train": "Maria | Tom | Ana | Li | Omar | Ruth | Jan | Priya | Carlos | Emma | Noah | Yuki | Sven | Zoe | Ali | "
    "Kate",
    "val": "Ivan | Grace | Hugo | Mina",
    "test": "Lena | Paul | Amir | Chloe | Diego | Aiko",
}
# in each of these, the last entries (how many: HELD_OUT) are kept for val and test
OPENERS = "Hi | Hello | Hey | Good morning | Dear team | Hi there | Hi, {name} here | Good evening | Hello all"
CLOSERS = "Thanks | Thank you | Best, {name} | Regards, {name} | Thanks a lot | Cheers, {name} | Many thanks"
URGENT = (
    "it is urgent | I need this today | please hurry | as soon as possible | right now please | "
    "this is really urgent | I need an answer today | please be quick"
)
CALM = "no rush | take your time | it is not urgent | whenever you have time | there is no hurry"
ORDERS = "order {n} | my order is {n} | order number {n} | #{n} | ref {n} | order no. {n} | it's order {n}"
HELD_OUT = 2
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def pick(random: Random, options: Sequence[str]) -> str:
    """One of ``options``. Of Random, only random() is promised to stay the same in every Python, so no choice()."""
    return options[int(random.random() * len(options))]


def shuffled(random: Random, options: Sequence[str]) -> list[str]:
    return sorted(options, key=lambda _: random.random())


def with_typo(random: Random, wording: str) -> str:
    """Swap two neighbouring letters inside one word of five letters or more; {item} and its like stay whole."""
    words = wording.split(" ")
    at = int(random.random() * len(words))
    if len(words[at]) < 5 or not words[at].isalpha():
        return wording
    cut = 1 + int(random.random() * (len(words[at]) - 3))
    word = words[at]
    words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def fill(random: Random, wording: str, item: str, quantity: int) -> str:
    """Put ``quantity`` of ``item`` into the wording, with the grammar that the number asks for."""
    if quantity == 1:
        phrase, words = f"{pick(random, ('the', 'my', 'my', 'this'))} {item}", {"it": "it", "is": "is", "has": "has"}
    else:
        number = pick(random, (str(quantity), NUMBER_WORDS[quantity]))
        phrase = f"{pick(random, ('', 'the ', 'my ', 'these '))}{number} {item}s"
        words = {"it": "them", "is": "are", "has": "have"}
    return wording.format(item=phrase, **words)


def join_parts(random: Random, opener: str, middle: list[str], closer: str) -> str:
    """Join the parts of a message the way a tidy writer does, or a hasty one: lower case, hardly a full stop."""
    if random.random() < 0.3:
        glue = pick(random, (", ", " - ", ". ", " "))
        return glue.join(part.rstrip("?!") for part in (opener, *middle, closer) if part).lower()
    ended = [part[0].upper() + part[1:] + ("" if part[-1] in "?!" else ".") for part in middle]
    greeting = [opener + pick(random, ("!", "."))] if opener else []
    return " ".join([*greeting, *ended, *([closer + pick(random, (".", "!"))] if closer else [])])


def make_row(random: Random, split: str, intent: str, wording: str, item: str) -> dict[str, Any]:
    """One row: the message of the customer and the JSON that should come back."""

    def some(phrases: str) -> str:  # one of the phrases around the request that this split may use
        options = phrases.split(" | ")
        return pick(random, options[:-HELD_OUT] if split == "train" else options)

    quantity = 1 if random.random() < 0.5 else 2 + int(random.random() * 5)
    order = str(1000 + int(random.random() * 9000)) if random.random() < 0.75 else None
    mood = random.random()  # 40 % urgent, 20 % say that they can wait, the rest say nothing
    request = fill(random, with_typo(random, wording) if random.random() < 0.1 else wording, item, quantity)
    extras = [some(ORDERS).format(n=order)] if order else []
    if mood < 0.6:
        extras.append(pick(random, (URGENT if mood < 0.4 else CALM).split(" | ")))
    middle = shuffled(random, [request, *extras]) if random.random() < 0.4 else [request, *extras]
    name = pick(random, NAMES[split].split(" | "))
    opener = some(OPENERS).format(name=name) if random.random() < 0.6 else ""
    closer = some(CLOSERS).format(name=name) if random.random() < 0.4 else ""
    answer = {"intent": intent, "item": item, "quantity": quantity, "order": order, "urgent": mood < 0.4}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": join_parts(random, opener, middle, closer)},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def make_split(split: str) -> list[dict[str, Any]]:
    """The rows of one split, intents in turn, without two of the same wording and item.

    In val and test three of four turns take their wording from train, but never their item.
    """
    random = Random(f"{SEED} {split}")
    items = ITEMS[split].split(" | ")
    pairs = {
        (source, intent): shuffled(random, [f"{wording} | {item}" for wording in text.split(" | ") for item in items])
        for source in dict.fromkeys((split, "train"))
        for intent, text in WORDINGS[source].items()
    }
    rows = []
    for number in range(ROWS[split]):
        turn, place = divmod(number, len(WORDINGS[split]))
        intent = list(WORDINGS[split])[place]
        wording, item = pairs["train" if turn % 4 else split, intent].pop().split(" | ")
        rows.append(make_row(random, split, intent, wording, item))
    return sorted(rows, key=lambda _: random.random())


def write_sample(folder: Path, *, force: bool = False) -> None:
    """Write train, val and test into ``folder``; files there that differ are a ``RefusedError`` unless ``force``."""
    splits = {split: make_split(split) for split in ROWS}
    paths = {split: Path(folder) / f"{split}.jsonl" for split in splits}
    with disk_errors(folder):
        was = {split: path.read_bytes() if path.exists() else None for split, path in paths.items()}
    changed = [split for split, rows in splits.items() if was[split] != b"".join(map(json_line, rows))]
    edited = [split for split in changed if was[split] is not None]
    if edited and not force:
        raise RefusedError(
            f"{paths[edited[0]].absolute()}: differs from what the generator makes, not overwritten",
            "keep your edits in another folder, choose one with --out, or overwrite with --force",
        )
    for split in changed:
        write_jsonl(paths[split], splits[split])
    print(f"sample-data: {', '.join(f'{len(splits[split])} {split}' for split in splits)} rows in {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-sample-data",
        description="Write the sample task (messages of customers, to be turned into JSON). The same files every time.",
        epilog="example: python scripts/sample_data.py --out /tmp/sample",
    )
    parser.add_argument("--out", type=Path, default=REPO_ROOT / "data" / "sample", help="default: data/sample")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ")
    arguments = parser.parse_args(argv)
    return command.guard(parser.prog, lambda: write_sample(arguments.out, force=arguments.force))


if __name__ == "__main__":
    raise SystemExit(main())
