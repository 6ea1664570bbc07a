"""What the page says, in three languages, and what went wrong as a line of it.

A text is named by its key and may have {placeholders}; a test holds that all languages have the
same ones. The table of the page itself is page_words.py.
"""

from common.errors import BadSampleError, UserError, is_memory_full
from inference.chat import BlankError, TooLongError
from inference.web.page_words import PAGE_WORDS

LANGUAGES = {"en": "English", "zh": "中文", "ja": "日本語"}
DEFAULT_LANGUAGE = "en"

ENGINE_WORDS: dict[str, dict[str, str]] = {
    # questions that are not answered
    "blank": {
        "en": "Type a question first.",
        "zh": "请先输入问题。",
        "ja": "まず質問を入力してください。",
    },
    "no_picture": {
        "en": "Add a picture first: without one the model can only guess.",
        "zh": "请先添加图片：没有图片，模型只能猜测。",
        "ja": "まず画像を追加してください。画像がないと、モデルは推測しかできません。",
    },
    "question_too_long": {
        "en": "The question is too long for this model: shorten it.",
        "zh": "问题太长，超出了模型的上限：请缩短。",
        "ja": "質問が長すぎて、このモデルでは扱えません。短くしてください。",
    },
    "conversation_too_long": {
        "en": "The conversation is too long for this model: start a new one, or go back to an "
        "earlier question.",
        "zh": "对话太长，超出了模型的上限：请开始新对话，或回到较早的问题。",
        "ja": "会話が長すぎて、このモデルでは扱えません。新しい会話を始めるか、前の質問に"
        "戻ってください。",
    },
    "too_many_turns": {
        "en": "A conversation has at most {most} questions: start a new one.",
        "zh": "一次对话最多 {most} 个问题：请开始新对话。",
        "ja": "一つの会話の質問は {most} 個までです。新しい会話を始めてください。",
    },
    "too_many_pictures": {
        "en": "A conversation has at most {most} pictures: start a new one.",
        "zh": "一次对话最多 {most} 张图片：请开始新对话。",
        "ja": "一つの会話の画像は {most} 枚までです。新しい会話を始めてください。",
    },
    "busy": {
        "en": "An answer is still on its way: wait for it, or stop it.",
        "zh": "上一个回答还没有结束：请等待，或停止它。",
        "ja": "前の回答がまだ終わっていません。待つか、停止してください。",
    },
    "gone": {
        "en": "This question is no longer there.",
        "zh": "这个问题已不存在。",
        "ja": "この質問はもうありません。",
    },
    "no_memory": {
        "en": "This is too large for the memory of this machine: ask a shorter question, or with "
        "fewer pictures.",
        "zh": "内存不足：请缩短问题，或减少图片。",
        "ja": "メモリが足りません。質問を短くするか、画像を減らしてください。",
    },
    "other_problem": {
        "en": "{reason}",
        "zh": "出现问题：{reason}",
        "ja": "問題があります：{reason}",
    },
    "unknown_problem": {
        "en": "Something went wrong here ({reason}); you can ask again.",
        "zh": "出错了（{reason}）；可以再问一次。",
        "ja": "エラーが起きました（{reason}）。もう一度質問できます。",
    },
    # where a question is
    "place": {
        "en": "Waiting: {place} before you.",
        "zh": "排队中：前面还有 {place} 个。",
        "ja": "待機中：前に {place} 件あります。",
    },
    "loading": {
        "en": "Loading the model …",
        "zh": "正在加载模型……",
        "ja": "モデルを読み込んでいます…",
    },
    "reading": {"en": "Looking at the picture …", "zh": "正在看图片……", "ja": "画像を見ています…"},
    "stopped": {"en": "stopped", "zh": "已停止", "ja": "停止しました"},
    # why a picture cannot be used; the key is the reason that `load_image` gives
    "image damaged": {
        "en": "it is damaged, or no picture",
        "zh": "文件已损坏，或不是图片",
        "ja": "壊れているか、画像ではありません",
    },
    "image too large": {
        "en": "it is too large: make it smaller first",
        "zh": "图片太大：请先缩小",
        "ja": "大きすぎます。先に小さくしてください",
    },
    "image too narrow": {
        "en": "it is too long and narrow: cut out a part of it",
        "zh": "图片太狭长：请裁剪",
        "ja": "細長すぎます。一部を切り取ってください",
    },
    "image missing": {"en": "it is not there", "zh": "文件不存在", "ja": "見つかりません"},
    "image cannot be read": {"en": "it cannot be read", "zh": "无法读取", "ja": "読み込めません"},
    "image is no file": {"en": "it is no file", "zh": "不是文件", "ja": "ファイルではありません"},
    "HEIC is not supported": {
        "en": "HEIC cannot be read here: convert it to JPEG or PNG",
        "zh": "不支持 HEIC：请转换为 JPEG 或 PNG",
        "ja": "HEIC は読めません。JPEG か PNG に変換してください",
    },
    "JPEG XL is not supported": {
        "en": "JPEG XL cannot be read here: convert it to JPEG or PNG",
        "zh": "不支持 JPEG XL：请转换为 JPEG 或 PNG",
        "ja": "JPEG XL は読めません。JPEG か PNG に変換してください",
    },
    "SVG is not supported": {
        "en": "SVG cannot be read here: convert it to JPEG or PNG",
        "zh": "不支持 SVG：请转换为 JPEG 或 PNG",
        "ja": "SVG は読めません。JPEG か PNG に変換してください",
    },
    "PDF is not supported": {
        "en": "PDF cannot be read here: convert it to JPEG or PNG",
        "zh": "不支持 PDF：请转换为 JPEG 或 PNG",
        "ja": "PDF は読めません。JPEG か PNG に変換してください",
    },
    "PostScript is not supported": {
        "en": "PostScript cannot be read here: convert it to JPEG or PNG",
        "zh": "不支持 PostScript：请转换为 JPEG 或 PNG",
        "ja": "PostScript は読めません。JPEG か PNG に変換してください",
    },
    "video is not supported": {
        "en": "it is a video: take a frame of it",
        "zh": "这是视频：请截取一帧",
        "ja": "動画です。一コマを画像にしてください",
    },
    "image is a web page": {
        "en": "it is a web page, no picture: fetch it again",
        "zh": "这是网页，不是图片：请重新下载",
        "ja": "画像ではなくウェブページです。もう一度取得してください",
    },
    "image is a Git LFS pointer": {
        "en": "it is only a pointer of Git LFS: run `git lfs pull`",
        "zh": "这只是 Git LFS 指针：请运行 `git lfs pull`",
        "ja": "Git LFS のポインタです。`git lfs pull` を実行してください",
    },
    # a conversation that is saved
    "question": {"en": "Question", "zh": "问题", "ja": "質問"},
    "answer": {"en": "Answer", "zh": "回答", "ja": "回答"},
    "conversation_title": {
        "en": "A conversation with MiniMind-V",
        "zh": "与 MiniMind-V 的对话",
        "ja": "MiniMind-V との会話",
    },
    "speed": {
        "en": "{n_tokens} tokens, {tokens_per_second} tokens/s, first token after {seconds} s",
        "zh": "{n_tokens} 个 token，{tokens_per_second} token/s，首个 token 用时 {seconds} 秒",
        "ja": "{n_tokens} トークン、{tokens_per_second} トークン/秒、"
        "最初のトークンまで {seconds} 秒",
    },
}
WORDS = ENGINE_WORDS | PAGE_WORDS


def say(key: str, language: str = DEFAULT_LANGUAGE, **values: object) -> str:
    """The text of that key, with its placeholders filled; English for a language not here."""
    texts = WORDS[key]
    return texts.get(language, texts[DEFAULT_LANGUAGE]).format(**values)


class Problem(UserError):
    """What went wrong, in any of the languages; as a str it is English.

    Args:
        key: of the table.
        values: of its placeholders.
    """

    def __init__(self, key: str, **values: object):
        super().__init__(say(key, **values))
        self.key, self.values = key, values

    def say(self, language: str) -> str:
        return say(self.key, language, **self.values)


def describe_problem(error: BaseException) -> Problem:
    """What a visitor is told of an error. One that nobody expects has the key unknown_problem."""
    # errors that are a line already
    if isinstance(error, Problem):
        return error
    if isinstance(error, BlankError):
        return Problem("blank")
    if isinstance(error, TooLongError):
        return Problem(f"{error.what}_too_long")
    if isinstance(error, BadSampleError) and error.args[0] in WORDS:
        return Problem(error.args[0])
    if isinstance(error, UserError):
        return Problem("other_problem", reason=str(error))
    if is_memory_full(error):
        return Problem("no_memory")
    return Problem("unknown_problem", reason=type(error).__name__)
