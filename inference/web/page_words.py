"""What the page says, in three languages; `say` of words.py finds it by its key."""

PAGE_WORDS = {
    # The top of the page.
    "tagline": {
        "en": "Ask about a picture",
        "zh": "给一张图，问一个问题",
        "ja": "画像について質問する",
    },
    "knows_scenes": {
        "en": "This demo's model knows drawn shapes only: circles, squares, triangles, stars, "
        "hearts and crosses in plain colors, none wider than a quarter of the picture. In its "
        "answers B1 is column B, row 1. About a photograph it can only guess.",
        "zh": "这个演示模型只认识画出来的图形：纯色的圆形、方形、三角形、星形、心形和十字形，"
        "宽度都不超过图片的四分之一。回答里的 B1 指 B 列第 1 行。对于照片，它只能瞎猜。",
        "ja": "このデモのモデルが知っているのは、単色で描かれた円・四角・三角・星・ハート・十字だけ"
        "です（幅は画像の 4 分の 1 まで）。答えの B1 は B 列 1 行目のことです。"
        "写真については当てずっぽうになります。質問は英語か中国語でどうぞ。",
    },
    "new_chat": {"en": "New chat", "zh": "新对话", "ja": "新しい会話"},
    "settings": {"en": "Settings", "zh": "设置", "ja": "設定"},
    "download": {"en": "Download", "zh": "下载", "ja": "保存"},
    # Settings.
    "language": {"en": "Language", "zh": "语言", "ja": "言語"},
    "model": {"en": "Model", "zh": "模型", "ja": "モデル"},
    "parameters": {
        "en": "{n} M parameters, {size} MB",
        "zh": "{n} M 参数，{size} MB",
        "ja": "パラメータ {n} M、{size} MB",
    },
    "trained": {
        "en": "{stage}, trained {date}",
        "zh": "{stage}，训练于 {date}",
        "ja": "{stage}、{date} に学習",
    },
    "score": {"en": "Score: {score}", "zh": "得分：{score}", "ja": "スコア：{score}"},
    "exact": {
        "en": "{percent} % exactly right",
        "zh": "{percent}% 完全正确",
        "ja": "完全正解 {percent}%",
    },
    "unusable": {
        "en": "These cannot be opened, they are damaged or no such model: {names}",
        "zh": "以下文件无法打开，已损坏或不是这种模型：{names}",
        "ja": "次のものは開けません（破損、またはこの種のモデルではありません）：{names}",
    },
    "temperature": {"en": "Temperature", "zh": "温度", "ja": "温度"},
    "temperature_help": {
        "en": "0 always takes the likeliest word; more lets rarer ones in.",
        "zh": "0 总是取最可能的词；越大，少见的词越有机会。",
        "ja": "0 は常に最も確率の高い語を選びます。大きいほど珍しい語も出ます。",
    },
    "top_p": {"en": "Top-p", "zh": "Top-p", "ja": "Top-p"},
    "top_p_help": {
        "en": "Choose among the likeliest words that hold this probability together.",
        "zh": "在合计达到该概率的最可能的词中选择。",
        "ja": "確率の合計がこの値になる上位の語から選びます。",
    },
    "max_new_tokens": {
        "en": "Longest answer (tokens)",
        "zh": "最长回答（token）",
        "ja": "回答の最大長（トークン）",
    },
    "seed": {"en": "Seed", "zh": "随机种子", "ja": "シード"},
    "seed_random": {"en": "a new one each time", "zh": "每次不同", "ja": "毎回新しい値"},
    # The composer.
    "ask": {
        "en": "Ask, and add or drop pictures here",
        "zh": "提问，可添加或拖入图片",
        "ja": "質問と画像をここに",
    },
    "examples": {"en": "Or try one of these:", "zh": "或者试试这些：", "ja": "または例をどうぞ："},
    "examples_checked": {
        "en": "this model has just answered each of them exactly right.",
        "zh": "这个模型刚才都答得完全正确。",
        "ja": "このモデルがたった今、どれも完全に正しく答えたものです。",
    },
    "examples_tried": {
        "en": "Trying examples with this model …",
        "zh": "正在用这个模型试例子……",
        "ja": "このモデルで例を試しています…",
    },
    "not_uploaded": {
        "en": "it did not arrive: a picture may have {most} MB, and has to be uploaded before you "
        "send the question",
        "zh": "没有收到：每张图片最多 {most} MB，并且要等上传完再提问",
        "ja": "届きませんでした：画像は 1 枚 {most} MB までで、アップロードの完了後に質問して"
        "ください",
    },
    "first_pictures": {
        "en": "only the first {most} pictures of a message are used",
        "zh": "每条消息只使用前 {most} 张图片",
        "ja": "1 つのメッセージで使うのは最初の {most} 枚だけです",
    },
    # A turn.
    "next": {"en": "You are next …", "zh": "马上轮到你……", "ja": "まもなくです…"},
    "growing": {"en": "Tokens: {n}", "zh": "{n} 个 token", "ja": "{n} トークン"},
    "stop": {"en": "Stop", "zh": "停止", "ja": "停止"},
    "regenerate": {"en": "Regenerate", "zh": "重新回答", "ja": "再生成"},
    "edit": {"en": "Edit", "zh": "编辑", "ja": "編集"},
    "edit_help": {
        "en": "Change the question; this answer and what follows go",
        "zh": "修改问题；这个回答及之后的内容会被删除",
        "ja": "質問を変更します。この回答以降は消えます",
    },
    "send": {"en": "Ask again", "zh": "重新提问", "ja": "もう一度質問"},
    "cancel": {"en": "Cancel", "zh": "取消", "ja": "キャンセル"},
    "answered_by": {
        "en": "Several pictures: {model} answered, which lies beside and was trained on several.",
        "zh": "多张图片：由同目录下用多图训练的 {model} 回答。",
        "ja": "画像が複数なので、複数画像で学習した隣の {model} が答えました。",
    },
    "one_picture_only": {
        "en": "Several pictures, but {model} was trained on one at a time: expect wrong answers.",
        "zh": "有多张图片，但 {model} 训练时每次只看一张：回答很可能出错。",
        "ja": "画像が複数ありますが、{model} は 1 枚ずつでしか学習していないので、答えは当てに"
        "なりません。",
    },
    "better_beside": {
        "en": "{model} lies beside and was trained on several pictures: choose it in the settings.",
        "zh": "同目录下的 {model} 用多图训练过：可在设置中选择。",
        "ja": "隣の {model} は複数画像で学習しています。設定で選べます。",
    },
    # What the model looks at.
    "click_a_word": {
        "en": "Click a word to see where the model looked.",
        "zh": "点击一个词，看看模型看了哪里。",
        "ja": "語をクリックすると、モデルが見た場所が表示されます。",
    },
    "looked_at": {
        "en": "Where the model looked for “{word}”",
        "zh": "模型为“{word}”看了哪里",
        "ja": "「{word}」のときにモデルが見た場所",
    },
    "attention": {"en": "Attention", "zh": "注意力", "ja": "注意"},
    "attention_help": {
        "en": "How much of the attention of this word fell on each patch.",
        "zh": "这个词的注意力落在每个图块上的多少。",
        "ja": "この語の注意が各パッチに向いた量です。",
    },
    "occlusion": {"en": "Occlusion", "zh": "遮挡", "ja": "遮蔽"},
    "occlusion_help": {
        "en": "How much less likely this word becomes when a patch is greyed out.",
        "zh": "把一个图块变灰后，这个词的概率下降多少。",
        "ja": "パッチを灰色にしたとき、この語の確率がどれだけ下がるかです。",
    },
    "occlude": {"en": "Grey out each patch", "zh": "逐块遮挡", "ja": "パッチを順に隠す"},
    "occluding": {
        "en": "Greying out patches: {done} of {total}",
        "zh": "正在遮挡图块：{done} / {total}",
        "ja": "パッチを隠しています：{done} / {total}",
    },
    "layer": {"en": "Layer", "zh": "层", "ja": "層"},
    "head": {"en": "Head", "zh": "头", "ja": "ヘッド"},
    "average": {"en": "average", "zh": "平均", "ja": "平均"},
    "picture": {"en": "Picture {number}", "zh": "图片 {number}", "ja": "画像 {number}"},
    "seen": {
        "en": "As the model sees it, in patches.",
        "zh": "模型看到的样子（分成图块）。",
        "ja": "モデルに見えているもの（パッチに分割）。",
    },
    "close": {"en": "Close", "zh": "关闭", "ja": "閉じる"},
}
